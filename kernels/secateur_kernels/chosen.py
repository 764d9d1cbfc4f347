"""The choice between implementations of one operation, by their time on the device."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from triton.runtime.cache import get_cache_manager
from triton.testing import do_bench

from secateur_kernels.tiles import FIXED

_FILE = "chosen.json"
_LOCK = threading.Lock()
_KNOWN: dict[str, str] = {}


def chosen(
    operation: str, key: Mapping[str, Any], implementations: Mapping[str, Callable[[], Any]], device: torch.device
) -> str:
    """Return the name of the fastest implementation.

    They are timed at the first call for a key and a device. The choice is kept in Triton's cache on disk, so that later
    processes take the same one: implementations may round differently. With SECATEUR_AUTOTUNE=0, under Triton's interpreter,
    and while a CUDA graph is captured for a key that was not timed yet, it is the first one.

    Args:
        operation: The name of the operation.
        key: What the times depend on, as JSON values.
        implementations: The implementations by name. Each can run several times.
        device: The CUDA device.

    Returns:
        The name.
    """
    first = next(iter(implementations))
    if FIXED:
        return first
    text = json.dumps({"operation": operation, "device": _named(device), "triton": triton.__version__, **key}, sort_keys=True)
    with _LOCK:
        if text not in _KNOWN:
            cache = get_cache_manager(hashlib.sha256(text.encode()).hexdigest())
            path = cache.get_file(_FILE)
            if path is not None:
                with open(path, encoding="utf-8") as file:
                    _KNOWN[text] = json.load(file)["chosen"]
            elif torch.cuda.is_current_stream_capturing():
                return first
            else:
                times = {name: do_bench(run, warmup=5, rep=20, return_mode="median") for name, run in implementations.items()}
                _KNOWN[text] = min(times, key=times.__getitem__)
                cache.put(json.dumps({"chosen": _KNOWN[text], "milliseconds": times, "key": text}), _FILE, binary=False)
        known = _KNOWN[text]
        return known if known in implementations else first


@functools.cache
def _named(device: torch.device) -> str:
    """The name of a device's kind."""
    return str(torch.cuda.get_device_name(device))
