"""prune: rebuilds a model physically smaller. What is rebuilt and gathered is data; `modeling.rebuild_` carries it out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.discovery import branches_of, fingerprint
from secateur.errors import InputError
from secateur.families import Family, branches, family_of
from secateur.modeling import rebuild_
from secateur.planning import Plan
from secateur.rebuild import Rebuild
from secateur.site import Attention, Site


def prune(model: nn.Module, plan: Plan) -> nn.Module:
    """A new model that computes what the masked model computes, without the removed units. The given one is untouched;
    weights that are not cut are copied.

    Raises InputError: a plan of another model; a model whose attention has lost channels already.
    """
    return rebuilt(model, rebuild_of(model, plan))


def prune_(model: nn.Module, plan: Plan) -> nn.Module:
    """`prune` in place; returns the model."""
    rebuild = rebuild_of(model, plan)
    _carry_out_(model, rebuild, rebuild.tensors(model))
    return model


def rebuilt(model: nn.Module, rebuild: Rebuild) -> nn.Module:
    """A new model with what was rebuilt; the given one is untouched."""
    # Weights about to be replaced need no copy: the copy may hold the originals until then.
    made = copy.deepcopy(model, {id(p): p for p in _replaced(model, rebuild).values()})
    _carry_out_(made, rebuild, rebuild.tensors(model))
    return made


def ungathered(model: nn.Module, rebuild: Rebuild) -> nn.Module:
    """The pruned model before its weights are gathered: what is cut is on the meta device, all else shares the model's memory.
    Frozen, in eval mode."""
    copied: nn.Module = replica(model, {})
    configs: dict[int, Any] = {}
    for module in copied.modules():
        for name in {"config", "generation_config"} & vars(module).keys():
            config = vars(module)[name]
            setattr(module, name, configs.setdefault(id(config), copy.deepcopy(config)))
    whole = {n: model.get_parameter(cut.source).detach() for n, cut in rebuild.cuts.items() if cut.blocks is None}
    _carry_out_(copied, rebuild, whole | rebuild.made)
    return copied.eval().requires_grad_(False)


def replica(module: nn.Module, tensors: Mapping[Tensor, Tensor], made: dict[nn.Module | Tensor, Any] | None = None) -> Any:
    """The module with modules and frozen parameters of its own, which hold the given tensors, or share the memory of the
    module's. `copy.deepcopy` does the same, twenty times slower. made: what of it is there already."""
    made = {} if made is None else made
    if module in made:
        return made[module]
    copied = made[module] = module.__new__(type(module))
    vars(copied).update(
        {name: value.copy() if isinstance(value, (dict, set)) else value for name, value in vars(module).items()}
    )
    for name, parameter in module._parameters.items():
        if parameter is not None:
            if parameter not in made:
                made[parameter] = nn.Parameter(tensors.get(parameter, parameter).detach(), requires_grad=False)
            copied._parameters[name] = made[parameter]
    for name, child in module._modules.items():
        if child is not None:
            copied._modules[name] = replica(child, tensors, made)
    return copied


def rebuild_of(model: nn.Module, plan: Plan) -> Rebuild:
    """What of the model a plan rebuilds, and out of which weights. Raises InputError as `prune` does."""
    found = fingerprint(model)
    if plan.fingerprint != found:
        raise InputError(f"plan: expected a plan of this model (fingerprint {found}), got one of another ({plan.fingerprint})")
    family, rebuild = family_of(model), Rebuild()
    cut = [site for site in plan.sites if len(plan[site.name]) < site.units]
    heads: dict[str, Tensor] = {}
    by_channel: dict[str, dict[str, Site]] = {}
    for site, branch in branches_of(model, cut).items():
        if site.unit in ("qk_channel", "vo_channel"):
            by_channel.setdefault(branch.name, {})[site.unit] = site
            continue
        for port in branch.cut(site.unit):
            index = port.channels(plan[site.name], site.units)
            rebuild.linear(model, port.path, **{"rows" if port.side == "output" else "columns": index})
        if isinstance(branch, Attention):
            heads[branch.name] = plan[site.name]
            groups = len(plan[site.name])
            attributes = family.attention_attributes(branch.heads // branch.groups * groups, groups, branch.head_dim)
            rebuild.attributes(branch.path, attributes)
    for name, units in by_channel.items():
        _cut_channels(model, family, name, {unit: plan[site.name] for unit, site in units.items()}, rebuild)
    if heads and family.cut_position_bias is not None:
        family.cut_position_bias(model, heads, rebuild)
    return rebuild


def _replaced(model: nn.Module, rebuild: Rebuild) -> dict[str, nn.Parameter]:
    """The parameters, by name, of the modules that the recipe replaces (not of those that it adds)."""
    modules = dict(model.named_modules())
    paths = [path for path in rebuild.recipe["modules"] if path in modules]
    return {f"{path}.{name}": p for path in paths for name, p in modules[path].named_parameters()}


def _cut_channels(model: nn.Module, family: Family, name: str, kept: Mapping[str, Tensor], rebuild: Rebuild) -> None:
    """Q and K, or V and O, lose channels. The attention itself stays the stock one at one width for all heads: the widest
    head's, or the dense one under rotary positions, whose channels must stay where they are."""
    branch = branches(model)[name]
    if not isinstance(branch, Attention):
        raise TypeError(f"{name} is no attention")
    full = torch.ones(branch.groups, branch.head_dim, dtype=torch.bool)
    qk, vo = full, full
    if "qk_channel" in kept:
        port = branch.cut("qk_channel")[1]
        qk = _mask(port.channels(kept["qk_channel"], full.numel() // (2 if branch.rotary else 1)), full)
    if "vo_channel" in kept:
        vo = _mask(kept["vo_channel"], full)
    width = branch.head_dim if branch.rotary else int(max(qk.sum(1).max(), vo.sum(1).max()))
    repeat = branch.heads // branch.groups
    sides = (
        (branch.query, qk.repeat_interleave(repeat, 0), branch.rotary),
        (branch.key, qk, branch.rotary),
        (branch.value, vo, False),
    )
    for path, mask, in_place in sides:
        if not bool(mask.all()) or width < branch.head_dim:
            rebuild.linear(model, path, rows=mask.flatten().nonzero().flatten(), scatter=_slots(mask, width, in_place))
    mask = vo.repeat_interleave(repeat, 0)
    if not bool(mask.all()) or width < branch.head_dim:
        slots = _slots(mask, width, False)
        filled = None if slots is None else (slots < int(mask.sum())).nonzero().flatten()
        rebuild.linear(model, branch.output, columns=mask.flatten().nonzero().flatten(), gather=filled)
    rebuild.attributes(branch.path, family.attention_attributes(branch.heads, branch.groups, width))


def _mask(index: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros_like(like)
    mask.view(-1)[index] = True
    return mask


def _slots(mask: Tensor, width: int, in_place: bool) -> Tensor | None:
    """Where kept channels [heads, head_dim] go in heads of `width`: for each output its source, or their number for none.
    None where every output has its source in order, so that a plain linear layer does."""
    total = int(mask.sum())
    head, channel = mask.nonzero(as_tuple=True)
    position = channel if in_place else (mask.cumsum(1) - 1)[head, channel]
    slots = torch.full((mask.shape[0] * width,), total)
    slots[head * width + position] = torch.arange(total)
    return None if torch.equal(slots, torch.arange(total)) else slots


def _carry_out_(model: nn.Module, rebuild: Rebuild, tensors: dict[str, Tensor]) -> None:
    """Rebuilds the model in place; the rebuilt modules get the given tensors, and stay on the meta device without one."""
    flags = {name: parameter.requires_grad for name, parameter in _replaced(model, rebuild).items()}
    rebuild_(model, rebuild.recipe, device="meta")
    model.load_state_dict(tensors, strict=False, assign=True)
    for name, flag in flags.items():
        model.get_parameter(name).requires_grad_(flag)
    _describe_(model, rebuild.recipe)


def _describe_(model: nn.Module, recipe: dict[str, Any]) -> None:
    """Makes the config true: a stock one if a stock model has this shape, else the stock one with the recipe in it."""
    config: Any = model.config
    merged = copy.deepcopy(getattr(config, "secateur", None)) or {"modules": {}, "attributes": {}, "own_position_bias": []}
    merged["modules"].update(recipe["modules"])
    for path, values in recipe["attributes"].items():
        merged["attributes"].setdefault(path, {}).update(values)
    merged["own_position_bias"] = sorted({*merged["own_position_bias"], *recipe["own_position_bias"]})
    if hasattr(config, "secateur"):
        del config.secateur
    fields = _stock_fields(model, merged)
    # Stacks hold copies of the config, and modules read it at run time.
    copies: dict[int, Any] = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for each in copies.values():
        for name, value in (fields or {}).items():
            setattr(each, name, value)
    if fields is None and merged["modules"]:
        config.secateur = merged


def _stock_fields(model: nn.Module, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """Config fields with which the stock class builds exactly this model, or None if none do."""
    if recipe["own_position_bias"] or any(s.keys() & {"scatter", "gather", "rank"} for s in recipe["modules"].values()):
        return None
    family = family_of(model)
    widths, shapes = set(), set()
    for branch in branches(model).values():
        if isinstance(branch, Attention):
            shapes.add((branch.heads, branch.groups, branch.head_dim))
        else:
            widths.add(branch.width)
    if len(widths) > 1 or len(shapes) > 1:
        return None
    fields = {family.ffn_field: widths.pop(), **family.attention_fields(*shapes.pop())}
    candidate: Any = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(candidate, name, value)
    try:
        with torch.device("meta"):
            stock = type(model)(candidate)
    except ValueError:  # The architecture's own check refuses the shape: no stock model has it.
        return None
    same = {n: p.shape for n, p in stock.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    attributes = [(path, name) for path, values in recipe["attributes"].items() for name in (*values, "scaling")]
    same = same and all(_attribute(stock, *at) == _attribute(model, *at) for at in attributes)
    return fields if same else None


def _attribute(model: nn.Module, path: str, name: str) -> Any:
    return getattr(model.get_submodule(path), name, None)
