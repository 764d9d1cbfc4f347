"""Shapes of matrix products: oneDNN makes a kernel for each, in about the time of the product, so they are few and kept."""

from __future__ import annotations

import os
import sys

from torch import nn

from secateur.tasks import TextTask

# Kernels kept, where oneDNN alone keeps 1,024. A pruned model has a shape for each width and length, and a run that goes
# through more of them than are kept, in the same order again and again, finds none.
KERNELS = 8192


def stepped(length: int) -> int:
    """The length, rounded up to one of sixteen in each octave: by less than a sixteenth, and not at all below 32."""
    step = 1 << max(0, length.bit_length() - 5)
    return -(-length // step) * step


def longest(task: TextTask, model: nn.Module) -> int:
    """Tokens of the longest input that the task's model takes."""
    limits = (task.room, getattr(getattr(model, "config", None), "max_position_embeddings", None))
    return min((limit for limit in limits if limit is not None), default=sys.maxsize)


def keep_kernels() -> None:
    """Makes oneDNN keep KERNELS of them, unless the environment says how many. For a process that is ours, and before its first
    matrix product, as oneDNN asks once."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
