"""PyTorch's one-pass GELU in place of the one that transformers computes by eight passes over memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from secateur.model.shortcuts.base import untouched

_GELU = nn.GELU(approximate="tanh")  # One object for all, so that torch.compile reuses the compiled code.


@contextmanager
def one_pass_activations(model: nn.Module) -> Iterator[None]:
    """A context in which PyTorch computes GELU's approximation by tanh ("gelu_new"), the same up to rounding.

    transformers computes it by eight operations, each a pass over memory.
    """
    from transformers.activations import NewGELUActivation

    activations = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation) and untouched(child)
    ]
    for parent, name, _ in activations:
        parent.set_submodule(name, _GELU)
    try:
        yield
    finally:
        for parent, name, child in activations:
            parent.set_submodule(name, child)
