"""Commands under torchrun: a group of all processes, one device each, and one line for what is wrong in any of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from traceback import clear_frames

import torch
import torch.distributed as dist
import typer

from secateur.cli import tell
from secateur.distributed import Ranks
from secateur.errors import InputError


@contextmanager
def processes(device: str, device_map: str | None) -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone. The CUDA device called "cuda" is a process's own.

    An InputError inside, in one of them or in all, is told by the first one, and all exit with code 2.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Ranks(None)
        return
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
        _forget_frames(error)
        raise typer.Exit(2) from None
    finally:
        # Nobody else may hold the group: its threads would abort the process at the interpreter's end.
        ranks.group = None
        dist.destroy_process_group()


def _forget_frames(error: BaseException) -> None:
    """What was local where an error was raised, and where those were that it came from, is let go."""
    link: BaseException | None = error
    while link is not None:
        clear_frames(link.__traceback__)
        link = link.__context__


def _take_device(device: str, local_rank: int) -> None:
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"device: expected one for each process, got {torch.cuda.device_count()} for process {local_rank + 1}")
    torch.cuda.set_device(local_rank)
