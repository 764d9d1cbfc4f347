"""Model families: the only place that knows the module paths of Hugging Face's models. One short file each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import InputError
from secateur.families.activations import one_pass_activations
from secateur.families.bart import BART
from secateur.families.base import Contribution, Family
from secateur.families.bert import BERT
from secateur.families.bfloat16_attention import bfloat16_attention
from secateur.families.checking import checked
from secateur.families.distilbert import DISTILBERT
from secateur.families.gpt2 import GPT2
from secateur.families.llama import LLAMA
from secateur.families.modernbert import MODERNBERT
from secateur.families.opt import OPT
from secateur.families.t5 import T5
from secateur.families.vit import VIT
from secateur.site import Branch

_FAMILIES: list[Family] = [T5, BART, BERT, DISTILBERT, MODERNBERT, LLAMA, GPT2, OPT, VIT]

# How many threads use a model that was made cheaper, and what undoes it.
_CHEAPER: WeakKeyDictionary[nn.Module, tuple[int, ExitStack]] = WeakKeyDictionary()
_LOCK = Lock()

__all__ = ["Contribution", "Family", "branches", "cheaper", "family_of", "in_rows", "register", "supported"]


def register(family: Family) -> None:
    """Adds a family; a later one wins where two name the same model type. Raises InputError for what is none."""
    if not isinstance(family, Family):
        raise InputError(f"family: expected a secateur.families.Family, got {type(family).__name__}")
    _FAMILIES.insert(0, family)


def supported() -> list[str]:
    """The model types that are known."""
    return sorted({name for family in _FAMILIES for name in family.model_types})


def family_of(model: nn.Module) -> Family:
    """The family of a model, by its config's model_type. Raises InputError for an unknown one."""
    family = _known(model)
    if family is None:
        raise InputError(
            f"model: expected one of the families {', '.join(supported())}, got model_type {_model_type(model)!r}; "
            "docs/add-a-family.md shows how to add one with secateur.families.register"
        )
    return family


def _known(model: nn.Module) -> Family | None:
    return next((family for family in _FAMILIES if _model_type(model) in family.model_types), None)


def _model_type(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "model_type", None)


def branches(model: nn.Module) -> dict[str, Branch]:
    """The prunable branches of a model by name, in the order of its forward pass."""
    return {branch.name: branch for branch in checked(family_of(model), model)}


def in_rows(model: nn.Module) -> list[RemovableHandle]:
    """Hooks under which the linear layers of all branches see [B, T, channels], until the handles are removed."""
    hooks = family_of(model).in_rows
    return [] if hooks is None else hooks(model)


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
