"""Commands under torchrun: a group of all processes, a device for each, and one line for an error in any of them."""

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
    """Join the processes that torchrun started; without torchrun, this process is alone.

    The CUDA device called "cuda" is the process's own. If an InputError occurs inside, in one process or in all of them, the
    first process reports it, and all exit with code 2.

    Args:
        device: The --device option.
        device_map: The --device-map option, which is refused for several processes.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Ranks(None)
        return
    # Transformers imports this module when it loads a model. The functions' default arguments then hold the group, and keep its
    # threads alive until the interpreter ends, which they may abort. So import it now, before there is a group.
    importlib.import_module("torch.distributed.nn")
    # The processes exchange sums on the CPU (gloo). A slow batch may keep the others waiting for a long time.
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
        dist.barrier()  # torchrun ends all processes once one has exited; wait until the line is printed.
        raise typer.Exit(2) from None
    finally:
        dist.destroy_process_group()


def _take_device(device: str, local_rank: int) -> None:
    """Make the process's own GPU the current CUDA device."""
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"device: expected one for each process, got {torch.cuda.device_count()} for process {local_rank + 1}")
    torch.cuda.set_device(local_rank)
