"""Commands under torchrun: a group of all processes, one device each, and one line for what is wrong in any of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import typer

from secateur.attribution.ranks import Ranks
from secateur.cli.shared.tell import tell
from secateur.support.errors import InputError


@contextmanager
def processes(device: str, device_map: str | None) -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone. The CUDA device called "cuda" is a process's own.

    An InputError inside, in one of them or in all, is told by the first one, and all exit with code 2.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Ranks(None)
        return
    # Transformers imports it with a model. Its functions have the group of that time as their default, and so would keep
    # the group's threads until the interpreter ends, which these may abort. Now there is no group yet.
    importlib.import_module("torch.distributed.nn")
    # What is sent are sums on the CPU; a slow batch may keep the others waiting for long.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    ranks = Ranks(dist.group.WORLD)
    try:
        with ranks.agreeing():
            if device_map is not None:
                raise InputError(f"device-map: expected one process, which has all devices, got {ranks.size}")
            _take_device(device, int(os.environ["LOCAL_RANK"]))
            yield ranks
    except InputError as error:
        if ranks.rank == 0:
            tell(str(error))
        dist.barrier()  # torchrun ends the others as soon as one has exited: not before the line is out.
        raise typer.Exit(2) from None
    finally:
        dist.destroy_process_group()


def _take_device(device: str, local_rank: int) -> None:
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"device: expected one for each process, got {torch.cuda.device_count()} for process {local_rank + 1}")
    torch.cuda.set_device(local_rank)
