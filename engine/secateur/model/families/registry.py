"""The registry of known families, and the family of a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from secateur.model.branches import Branch
from secateur.model.families.bart import BART
from secateur.model.families.base import Family
from secateur.model.families.bert import BERT
from secateur.model.families.checking import checked
from secateur.model.families.distilbert import DISTILBERT
from secateur.model.families.gpt2 import GPT2
from secateur.model.families.llama import LLAMA
from secateur.model.families.modernbert import MODERNBERT
from secateur.model.families.opt import OPT
from secateur.model.families.t5 import T5
from secateur.model.families.vit import VIT
from secateur.support.errors import InputError

_FAMILIES: list[Family] = [T5, BART, BERT, DISTILBERT, MODERNBERT, LLAMA, GPT2, OPT, VIT]


def register_family(family: Family) -> None:
    """Add a family of models. Of two families with the same model type the later one wins.

    Args:
        family: Where the linear layers of its models are, and what their config says.

    Raises:
        InputError: The argument is not a `secateur.families.Family`.
    """
    if not isinstance(family, Family):
        raise InputError(f"family: expected a secateur.families.Family, got {type(family).__name__}")
    _FAMILIES.insert(0, family)


def supported() -> list[str]:
    """Return the known model types."""
    return sorted({name for family in _FAMILIES for name in family.model_types})


def family_of(model: nn.Module) -> Family:
    """Return the family of a model, by its config's model_type. Raises InputError for an unknown one."""
    family = _known(model)
    if family is None:
        raise InputError(
            f"model: expected one of the families {', '.join(supported())}, got model_type {_model_type(model)!r}; "
            "docs/guides/add-a-family.md shows how to add one with secateur.register_family"
        )
    return family


def _known(model: nn.Module) -> Family | None:
    return next((family for family in _FAMILIES if _model_type(model) in family.model_types), None)


def is_known(model: nn.Module) -> bool:
    """Return whether a model is of a known family."""
    return _known(model) is not None


def takes_label_tree(model: nn.Module) -> bool:
    """Return whether a model's family is known to read a label tree on cached states, as `Family.cached_label_tree` says."""
    family = _known(model)
    return family is not None and family.cached_label_tree


def _model_type(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "model_type", None)


def branches(model: nn.Module) -> dict[str, Branch]:
    """Return the prunable branches of a model by name, in the order of its forward pass."""
    return {branch.name: branch for branch in checked(family_of(model), model)}


def split_token_rows(model: nn.Module) -> list[RemovableHandle]:
    """Register hooks under which the linear layers of all branches see [B, T, channels], and return their handles."""
    hooks = family_of(model).split_token_rows
    return [] if hooks is None else hooks(model)
