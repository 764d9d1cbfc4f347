"""Activations that transformers spells out, each operation a pass over memory, as the one that PyTorch has for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from secateur.model.shortcuts.base import untouched

_GELU = nn.GELU(approximate="tanh")  # The same one each time: what was compiled with it holds.


@contextmanager
def one_pass_activations(model: nn.Module) -> Iterator[None]:
    """Within it GELU's approximation by tanh ("gelu_new"), eight passes, is PyTorch's own: the same up to rounding."""
    from transformers.activations import NewGELUActivation

    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation) and untouched(child)
    ]
    for parent, name, _ in found:
        parent.set_submodule(name, _GELU)
    try:
        yield
    finally:
        for parent, name, child in found:
            parent.set_submodule(name, child)
