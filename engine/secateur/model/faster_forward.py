"""A context in which a model computes the same outputs in fewer operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

from secateur.model.families.registry import _known
from secateur.model.shortcuts.bfloat16_attention import bfloat16_attention
from secateur.model.shortcuts.one_pass_gelu import one_pass_activations

# How many threads are in the context of a model, and what undoes it.
_IN_USE: WeakKeyDictionary[nn.Module, tuple[int, ExitStack]] = WeakKeyDictionary()
_LOCK = Lock()


@contextmanager
def faster_forward(model: nn.Module) -> Iterator[None]:
    """Within it a model of any family, known or not, computes the same outputs, up to rounding, in fewer operations. Of several
    threads with one model the first makes it so, and the last undoes it: nobody's pass changes on the way."""
    with _LOCK:
        threads, undo = _IN_USE[model] if model in _IN_USE else (0, _enter(model))
        _IN_USE[model] = threads + 1, undo
    try:
        yield
    finally:
        with _LOCK:
            threads, undo = _IN_USE.pop(model)
            if threads > 1:
                _IN_USE[model] = threads - 1, undo
            else:
                undo.close()


def _enter(model: nn.Module) -> ExitStack:
    """What undoes it."""
    family = _known(model)
    with ExitStack() as entered:
        entered.enter_context(one_pass_activations(model))
        entered.enter_context(bfloat16_attention(model))
        if family is not None and family.faster_forward is not None:
            entered.enter_context(family.faster_forward(model))
        return entered.pop_all()
