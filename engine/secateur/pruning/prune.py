"""prune: rebuild a model physically smaller. A `Rebuild` holds what to rebuild as data; `modeling.rebuild_` carries it out."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.blocks import blocks
from secateur.model.branches import Attention, Branch, Port, attentions, feed_forwards
from secateur.model.discovery import branches_of, fingerprint
from secateur.model.families import Family, family_of
from secateur.model.linear_layers import is_kind, weight_of
from secateur.model.modeling import GatherLinear, rebuild_
from secateur.model.offloading import copy_of
from secateur.model.ordinary import carry_hooks, require_no_wrapped_forwards, require_ordinary, require_own_forwards
from secateur.model.recipe import Rebuild, renamed
from secateur.model.sites import Unit
from secateur.planning.plan import Plan, as_plan
from secateur.pruning.describe import describe_
from secateur.pruning.keep_blocks import remove_blocks_, removed_branches
from secateur.support.compat import own_modules, own_parameters, rebind_accelerate_
from secateur.support.errors import InputError


def prune(model: nn.Module, plan: Plan | str | Path) -> nn.Module:
    """Return a new model that computes what the masked model computes, without the removed units.

    Args:
        model: The dense model. It stays unchanged. Weights that are not cut are copied.
        plan: A plan of this model, or the path of its file.

    Raises:
        InputError: The plan is of another model, or removes blocks that this one cannot lose; the model's attention has lost
            channels already; or the model is compiled, has adapters, masks or quantised weights, or a module's forward method
            was replaced.
    """
    plan = as_plan(plan)
    return rebuilt(model, rebuild_of(model, plan), plan.removed_blocks)


@torch.inference_mode(False)  # No inference tensors: the new model may outlive the caller's inference mode.
def prune_(model: nn.Module, plan: Plan | str | Path) -> nn.Module:
    """Prune a model in place, as `prune` does, and return it.

    Args:
        model: The dense model. Its modules are replaced.
        plan: The plan, made from scores of this model, or the path of its file.

    Returns:
        The same model, now smaller.

    Raises:
        InputError: As `prune` does.
    """
    plan = as_plan(plan)
    rebuild = rebuild_of(model, plan)
    _carry_out_(model, rebuild, rebuild.tensors(model))
    remove_blocks_(model, plan.removed_blocks)
    return model


@torch.inference_mode(False)  # No inference tensors: the new model may outlive the caller's inference mode.
def rebuilt(model: nn.Module, rebuild: Rebuild, removed: Collection[str] = ()) -> nn.Module:
    """Return a new model that is rebuilt, without some blocks; the given one stays unchanged.

    Raises:
        InputError: As `require_own_forwards`.
    """
    require_own_forwards(model)
    # Weights that are about to be replaced or removed need no copy: the new model may hold the originals until then.
    replaced = [*_replaced(model, rebuild).values(), *_of_blocks(model, removed)]
    smaller: nn.Module = copy_of(model, {id(p): p for p in replaced})
    _carry_out_(smaller, rebuild, rebuild.tensors(model))
    remove_blocks_(smaller, removed)
    return smaller


def ungathered(model: nn.Module, rebuild: Rebuild) -> nn.Module:
    """Return the pruned model before its weights are gathered, frozen and in eval mode.

    Cut tensors are on the meta device. All other tensors share the memory of the dense model.

    Raises:
        InputError: As `require_no_wrapped_forwards`.
    """
    require_no_wrapped_forwards(model)
    copied: nn.Module = replica(model, {})
    configs: dict[int, Any] = {}
    for module in copied.modules():
        for name in {"config", "generation_config"} & vars(module).keys():
            config = vars(module)[name]
            setattr(module, name, configs.setdefault(id(config), copy.deepcopy(config)))
    whole = {
        name: cut.of(dense) if cut.turned else dense
        for name, cut in rebuild.cuts.items()
        if cut.blocks is None
        for dense in [model.get_parameter(cut.source).detach()]
    }
    _carry_out_(copied, rebuild, whole | rebuild.new)
    return copied.eval().requires_grad_(False)


@torch.inference_mode(False)  # No inference tensors: the new model may outlive the caller's inference mode.
def add_biases_(model: nn.Module, paths: Iterable[str]) -> None:
    """Give the linear layers at these paths a bias of zeros, in place, and note it in the config."""
    rebuild, tensors = Rebuild(), dict[str, Tensor]()
    for path in paths:
        layer: Any = model.get_submodule(path)
        weight, inner = weight_of(layer).detach(), path
        spec: dict[str, Any] = {"linear": [weight.shape[1], weight.shape[0]], "bias": True}
        if is_kind(layer, GatherLinear):
            spec["gather"], tensors[f"{path}.slots"], inner = True, layer.slots.detach(), f"{path}.linear"
        rebuild.recipe["modules"][path] = spec
        tensors |= {f"{inner}.weight": weight, f"{inner}.bias": weight.new_zeros(len(weight))}
    _carry_out_(model, rebuild, tensors)


def replica(module: nn.Module, tensors: Mapping[Tensor, Tensor], copies: dict[nn.Module | Tensor, Any] | None = None) -> Any:
    """Return a copy of a module with modules and frozen parameters of its own.

    `copy.deepcopy` does the same, twenty times slower.

    Args:
        module: The module.
        tensors: By parameter, the tensor that its copy holds. Other copies share the memory of their parameter.
        copies: The modules and parameters that are copied already, with their copies.
    """
    copies = {} if copies is None else copies
    if module in copies:
        return copies[module]
    copied = copies[module] = module.__new__(type(module))
    vars(copied).update(
        {name: value.copy() if isinstance(value, (dict, set)) else value for name, value in vars(module).items()}
    )
    for name, parameter in own_parameters(module).items():
        if parameter is not None:
            if parameter not in copies:
                copies[parameter] = nn.Parameter(tensors.get(parameter, parameter).detach(), requires_grad=False)
            own_parameters(copied)[name] = copies[parameter]
    for name, child in own_modules(module).items():
        if child is not None:
            own_modules(copied)[name] = replica(child, tensors, copies)
    return copied


def rebuild_of(model: nn.Module, plan: Plan | str | Path) -> Rebuild:
    """Return the modules that a plan rebuilds and the slices of weights that they are made from.

    Blocks that the plan removes are still whole in the rebuilt model. `remove_blocks_` takes them out.

    Raises:
        InputError: As `prune`.
    """
    require_ordinary(model)
    require_own_forwards(model)
    plan = as_plan(plan)
    own = fingerprint(model)
    if plan.fingerprint != own:
        raise InputError(f"plan: expected a plan of this model (fingerprint {own}), got one of another ({plan.fingerprint})")
    removed = removed_branches(model, plan)
    family, rebuild = family_of(model), Rebuild()
    kept: dict[Branch, dict[Unit, Tensor]] = {}
    for site, branch in branches_of(model, plan.sites).items():
        if branch.name not in removed and len(plan[site.name]) < site.units:
            kept.setdefault(branch, {})[site.unit] = plan[site.name]
    for ffn in feed_forwards(kept):
        for unit, units in kept[ffn].items():
            _cut_units(model, ffn.cut_at(unit), units, ffn.width, rebuild)
    heads = {attention.name: torch.empty(0, dtype=torch.int64) for attention in attentions(removed.values())}
    for attention in attentions(kept):
        whole = attention.whole_heads(kept[attention])
        if whole is None:
            _cut_channels(model, family, attention, kept[attention], rebuild)
        else:
            _cut_heads(model, family, attention, whole, rebuild)
            heads[attention.name] = whole
    if heads and family.cut_position_bias is not None:
        family.cut_position_bias(model, heads, rebuild)
    return rebuild


def _of_blocks(model: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """Return the parameters of some blocks."""
    of_model = blocks(model) if names else {}
    return [parameter for name in names for parameter in model.get_submodule(of_model[name].path).parameters()]


def _replaced(model: nn.Module, rebuild: Rebuild) -> dict[str, nn.Parameter]:
    """Return the parameters by name of the modules that the recipe replaces, without the modules that it adds."""
    modules = dict(model.named_modules())
    paths = [path for path in rebuild.recipe["modules"] if path in modules]
    return {f"{path}.{name}": p for path in paths for name, p in modules[path].named_parameters()}


def _cut_units(model: nn.Module, ports: Iterable[Port], kept: Tensor, units: int, rebuild: Rebuild) -> None:
    """Note that linear layers keep, at these ports, the channels of the kept units (int64) out of `units`."""
    for port in ports:
        rebuild.linear(model, port.path, **{"rows" if port.side == "output" else "columns": port.channels(kept, units)})


def _cut_heads(model: nn.Module, family: Family, branch: Attention, kept: Tensor, rebuild: Rebuild) -> None:
    """Note that an attention keeps some heads (int64), or none."""
    ((unit, count),) = branch.sites("head").values()
    # Without query heads the one key-value head goes too.
    ports = branch.cut_at(unit if len(kept) else "head")
    _cut_units(model, ports, kept, count if len(kept) else branch.groups, rebuild)
    if len(kept):
        heads, groups = (len(kept), 1) if unit == "query_head" else (branch.heads // branch.groups * len(kept), len(kept))
        rebuild.attributes(branch.path, family.attention_attributes(heads, groups, branch.head_dim))
    else:
        branch.replaced_by_nothing(rebuild)


def _cut_channels(model: nn.Module, family: Family, branch: Attention, kept: Mapping[Unit, Tensor], rebuild: Rebuild) -> None:
    """Note that Q and K, or V and O, lose channels.

    The attention stays the stock one, with one width for all heads: the width of the widest head, or the dense width under
    rotary positions, whose channels must stay where they are.
    """
    full = torch.ones(branch.groups, branch.head_dim, dtype=torch.bool)  # [groups, head_dim]
    qk, vo = full, full  # Kept channels of keys, and of values: [groups, head_dim].
    if "qk_channel" in kept:
        pairs = _mask(kept["qk_channel"], full[:, : branch.head_dim // 2] if branch.rotary else full)
        qk = torch.cat([pairs, pairs], 1) if branch.rotary else pairs
    if "vo_channel" in kept:
        vo = _mask(kept["vo_channel"], full)
    width = branch.head_dim if branch.rotary else int(max(qk.sum(1).max(), vo.sum(1).max()))
    repeat = branch.heads // branch.groups
    # By layer, the masks of the projections that it makes, and whether kept channels stay in place.
    masks: dict[str, list[tuple[Tensor, bool]]] = {}
    for path, mask, in_place in (
        (branch.query, qk.repeat_interleave(repeat, 0), branch.rotary),  # [heads, head_dim]
        (branch.key, qk, branch.rotary),  # [groups, head_dim]
        (branch.value, vo, False),  # [groups, head_dim]
    ):
        masks.setdefault(path, []).append((mask, in_place))
    for path, of_layer in masks.items():
        stay = torch.cat([mask for mask, _ in of_layer])  # [heads of all projections, head_dim]
        if not bool(stay.all()) or width < branch.head_dim:
            slots = _joined([_slots(mask, width, in_place) for mask, in_place in of_layer])
            rebuild.linear(model, path, rows=stay.flatten().nonzero().flatten(), scatter=_identity_dropped(slots))
    mask = vo.repeat_interleave(repeat, 0)  # [heads, head_dim]
    if not bool(mask.all()) or width < branch.head_dim:
        read = _identity_dropped(_slots(mask, width, False))  # [heads * width] or None
        filled = None if read is None else (read < int(mask.sum())).nonzero().flatten()  # [kept channels]
        rebuild.linear(model, branch.output, columns=mask.flatten().nonzero().flatten(), gather=filled)
    rebuild.attributes(branch.path, family.attention_attributes(branch.heads, branch.groups, width))


def _mask(index: Tensor, like: Tensor) -> Tensor:
    """Return a mask of the shape of `like` that is true at the flat positions `index`."""
    mask = torch.zeros_like(like)
    mask.view(-1)[index] = True
    return mask


def _slots(mask: Tensor, width: int, in_place: bool) -> tuple[Tensor, int]:
    """Return where kept channels go in heads of a common width, and the number of kept channels.

    Args:
        mask: [heads, head_dim], bool: the kept channels.
        width: The width of each head in the rebuilt layer.
        in_place: Whether channels keep their position in the head. Otherwise they move to its beginning.

    Returns:
        Slots [heads * width], int64: for each output the number of the kept channel that fills it, or the number of kept
        channels for an output that none fills; and the number of kept channels.
    """
    total = int(mask.sum())
    head, channel = mask.nonzero(as_tuple=True)  # [total] each
    position = channel if in_place else (mask.cumsum(1) - 1)[head, channel]  # [total]
    slots = torch.full((mask.shape[0] * width,), total)  # [heads * width]
    slots[head * width + position] = torch.arange(total)
    return slots, total


def _joined(parts: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, int]:
    """Return the slots of a layer that makes several projections, one after the other, from the slots of each."""
    every, before = sum(total for _, total in parts), 0
    joined = []
    for slots, total in parts:
        joined.append(torch.where(slots < total, slots + before, every))  # [heads * width of this projection]
        before += total
    return torch.cat(joined), every


def _identity_dropped(placed: tuple[Tensor, int]) -> Tensor | None:
    """Return the slots, or None where every output has its channel in order, so that a plain linear layer does the same."""
    slots, total = placed
    return None if torch.equal(slots, torch.arange(total)) else slots


def _carry_out_(model: nn.Module, rebuild: Rebuild, tensors: dict[str, Tensor]) -> None:
    """Rebuild the model in place. Rebuilt parameters get the given tensors; without one they stay on the meta device."""
    flags = {name: parameter.requires_grad for name, parameter in _replaced(model, rebuild).items()}
    new_names = renamed(rebuild.recipe, flags)
    flags = {new_names.get(name, name): flag for name, flag in flags.items()}
    old = {path: module for path, module in model.named_modules() if path in rebuild.recipe["modules"]}
    rebuild_(model, rebuild.recipe, device="meta")
    for path in (*rebuild.recipe["own_position_bias"], *rebuild.recipe["no_attention"]):
        rebind_accelerate_(model.get_submodule(path))
    for path, module in old.items():
        new = model.get_submodule(path)
        carry_hooks(module, new)
        for name, part in module.named_children():  # The parts of an AroundLinear.
            if name in own_modules(new):
                carry_hooks(part, new.get_submodule(name))
    model.load_state_dict(tensors, strict=False, assign=True)
    left = dict(model.named_parameters())
    for name in flags.keys() & left.keys():
        left[name].requires_grad_(flags[name])
    describe_(model, rebuild.recipe)
