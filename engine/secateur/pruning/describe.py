"""describe_: make a config describe a rebuilt model; it is stock where the model's own class can have this shape."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from secateur.model.families import branches, family_of
from secateur.model.recipe import Rebuild, has_around
from secateur.model.sites import Site
from secateur.support.errors import InputError


def describe_(model: nn.Module, recipe: dict[str, Any]) -> None:
    """Make the config describe the model.

    It becomes a stock config if a stock model has this shape. Otherwise it is the stock config with the recipe in it.

    Args:
        model: The rebuilt model.
        recipe: The recipe of what was rebuilt since the config last described the model.
    """
    config: Any = model.config
    merged = Rebuild().recipe | copy.deepcopy(getattr(config, "secateur", {}))
    merged["modules"].update(recipe["modules"])
    merged["no_attention"].update(recipe["no_attention"])
    for path, values in recipe["attributes"].items():
        merged["attributes"].setdefault(path, {}).update(values)
    merged["own_position_bias"] = sorted({*merged["own_position_bias"], *recipe["own_position_bias"]})
    if hasattr(config, "secateur"):
        del config.secateur
    fields = _stock_fields(model, merged)
    # Stacks hold copies of the config, and modules read it at run time.
    copies: dict[int, Any] = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for of_stack in copies.values():
        for name, value in (fields or {}).items():
            setattr(of_stack, name, value)
    if fields is None and merged["modules"]:
        config.secateur = merged


def _stock_fields(model: nn.Module, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """Return config fields with which the stock class builds exactly this model, or None if there are none."""
    if any(map(has_around, recipe["modules"].values())) or recipe["own_position_bias"] or recipe["no_attention"]:
        return None
    family = family_of(model)
    fields: dict[str, Any] = {}
    for branch in branches(model).values():
        if branch.empty:
            return None
        for name, value in family.config_fields(branch).items():
            if fields.setdefault(name, value) != value:
                return None
    # A field that a config leaves to its default is set only once the default is wrong.
    fields = {name: value for name, value in fields.items() if hasattr(model.config, name) or recipe["attributes"]}
    candidate: Any = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(candidate, name, value)
    try:
        if hasattr(candidate, "validate"):
            candidate.validate()  # Saving and loading the config validate it too.
        with torch.device("meta"):
            stock = stock_class(model)(candidate)
    except (ValueError, StrictDataclassError):  # The architecture's own check refuses the shape: no stock model has it.
        return None
    same = {n: p.shape for n, p in stock.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    attributes = [(path, name) for path, values in recipe["attributes"].items() for name in (*values, "scaling")]
    same = same and all(_attribute(stock, *at) == _attribute(model, *at) for at in attributes)
    return fields if same else None


def require_all_layers(model: nn.Module, chosen: Sequence[Site]) -> None:
    """Refuse to prune some of the layers whose width or number of heads is one field of a stock config.

    Args:
        model: The dense model.
        chosen: The sites to prune.

    Raises:
        InputError: A site shares a field with one that is not chosen.
    """
    family, by_name = family_of(model), {site.name: site for site in chosen}
    first: dict[str, tuple[bool, str]] = {}
    for name, branch in branches(model).items():
        site = by_name.get(name)
        if site is not None and site.in_stock == "whole":
            continue
        for field in family.config_fields(branch):
            picked, other = first.setdefault(field, (site is not None, name))
            if picked != (site is not None):
                inside, outside = (other, name) if picked else (name, other)
                raise InputError(
                    f"sites: expected all sites of a stock model's {field}, got {inside} without {outside}, which has the same"
                )


def stock_class(model: nn.Module) -> type[nn.Module]:
    """Return the transformers class of a model or of its rebuilt class's base; the model's own class if there is none.

    A base without a forward pass, such as BertPreTrainedModel, does not count.
    """
    known = (cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models."))
    return next((cls for cls in known if not cls.__name__.endswith("PreTrainedModel")), type(model))


def _attribute(model: nn.Module, path: str, name: str) -> Any:
    return getattr(model.get_submodule(path), name, None)
