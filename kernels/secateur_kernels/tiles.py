"""What the Triton kernels share: how they are tuned, and views of their arguments. Imported with a kernel, never before."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

from secateur_kernels.backend import INTERPRETED

FIXED = INTERPRETED or os.environ.get("SECATEUR_AUTOTUNE") == "0"
# A product and a sum fused here and not there, as layouts have it, would round differently.
OPTIONS = {"enable_fp_fusion": False}


def tuned(*candidates: dict[str, int], key: list[str]) -> Callable[[Any], Any]:
    """Times a kernel's candidates once for each dtype and value of `key`, and keeps the outcome on disk.

    A candidate may set only what leaves the order of additions alone, so that whichever is faster never changes a bit of a
    result; what sets that order is a function of shapes and dtype, given at the launch. SECATEUR_AUTOTUNE=0: the first
    candidate, untimed.
    """
    configs = []
    for candidate in candidates[:1] if FIXED else candidates:
        options = {key: value for key, value in candidate.items() if key.isupper()}
        limits = {name: candidate.get(name) for name in ("num_warps", "num_stages")}
        configs.append(triton.Config(options, **limits))
    decorator: Callable[[Any], Any] = triton.autotune(configs, key=key, cache_results=True)
    return decorator


def rows(tensor: Tensor) -> Tensor:
    """[..., C] as [N, C] with stride 1 along C: a view where the strides allow one, else a copy."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
