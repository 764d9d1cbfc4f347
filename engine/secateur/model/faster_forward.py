"""A context in which a model computes the same outputs in fewer operations."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

from secateur.model.families.registry import _known
from secateur.model.shortcuts.bfloat16_attention import bfloat16_attention
from secateur.model.shortcuts.one_pass_gelu import one_pass_activations
from secateur.model.undisturbed import whole_feed_forward

# By model, the number of threads inside the context and the stack that undoes it.
_IN_USE: WeakKeyDictionary[nn.Module, tuple[int, ExitStack]] = WeakKeyDictionary()
_LOCK = Lock()


@contextmanager
def faster_forward(model: nn.Module, needed: Collection[str] = ()) -> Iterator[None]:
    """A context in which a model of any family, known or not, computes the same outputs, up to rounding, in fewer operations.

    When several threads use one model, the first to enter changes the model and the last to leave undoes the change. So no
    forward pass changes halfway.

    Args:
        model: The model.
        needed: The paths of linear layers that must run, on whatever tokens, because something watches them. Threads that use
            one model at the same time need the same layers.

    Yields:
        Nothing. The model is as before after the last thread.
    """
    with _LOCK:
        threads, undo = _IN_USE[model] if model in _IN_USE else (0, _enter(model, needed))
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


def _enter(model: nn.Module, needed: Collection[str]) -> ExitStack:
    """Change the model and return the stack that undoes the change."""
    family = _known(model)
    with ExitStack() as entered:
        entered.enter_context(whole_feed_forward(model))
        entered.enter_context(one_pass_activations(model))
        entered.enter_context(bfloat16_attention(model))
        if family is not None and family.faster_forward is not None:
            entered.enter_context(family.faster_forward(model, needed))
        return entered.pop_all()
