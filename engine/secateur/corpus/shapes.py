"""Limit the shapes of matrix products: oneDNN makes a kernel for each shape, which takes about as long as the product."""

from __future__ import annotations

import os
import sys

from torch import nn

from secateur.tasks import Task

# The size of oneDNN's kernel cache, which is 1,024 by default. A pruned model has a shape for each width and length. If a run
# repeats more shapes than the cache holds, always in the same order, no kernel is ever reused.
KERNELS = 8192


def stepped(length: int) -> int:
    """Round a length up to one of sixteen steps in each octave.

    It grows by less than a sixteenth. Lengths below 32 stay as they are.
    """
    step = 1 << max(0, length.bit_length() - 5)
    return -(-length // step) * step


def longest(task: Task, model: nn.Module) -> int:
    """Return the number of tokens of the longest input that the task's model takes."""
    room = task.room(model)
    return sys.maxsize if room is None else room


def keep_kernels() -> None:
    """Set the size of oneDNN's kernel cache to KERNELS, unless the environment sets it.

    Call it only in a process that belongs to secateur, before the first matrix product: oneDNN reads the size once.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
