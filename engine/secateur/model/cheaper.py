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

# How many threads use a model that was made cheaper, and what undoes it.
_CHEAPER: WeakKeyDictionary[nn.Module, tuple[int, ExitStack]] = WeakKeyDictionary()
_LOCK = Lock()


@contextmanager
def cheaper(model: nn.Module) -> Iterator[None]:
    """Within it a model of any family, known or not, computes the same outputs, up to rounding, in fewer operations. Of several
    threads with one model the first makes it so, and the last undoes it: nobody's pass changes on the way."""
    with _LOCK:
        threads, undo = _CHEAPER[model] if model in _CHEAPER else (0, _made_cheaper(model))
        _CHEAPER[model] = threads + 1, undo
    try:
        yield
    finally:
        with _LOCK:
            threads, undo = _CHEAPER.pop(model)
            if threads > 1:
                _CHEAPER[model] = threads - 1, undo
            else:
                undo.close()


def _made_cheaper(model: nn.Module) -> ExitStack:
    """What undoes it."""
    family = _known(model)
    with ExitStack() as entered:
        entered.enter_context(one_pass_activations(model))
        entered.enter_context(bfloat16_attention(model))
        if family is not None and family.cheaper is not None:
            entered.enter_context(family.cheaper(model))
        return entered.pop_all()
