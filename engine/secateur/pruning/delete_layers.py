"""delete_layers: whole blocks, or single branches of them, go physically, and no logit changes but by rounding."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from secateur.model.blocks import Block, blocks, contributes, contribution, layers
from secateur.model.branches import Branch, attentions
from secateur.model.families import family_of
from secateur.model.linear_layers import shape_of
from secateur.model.recipe import Rebuild
from secateur.model.sites import Stack
from secateur.pruning.prune import describe_, rebuilt
from secateur.support.errors import InputError


def delete_layers(model: nn.Module, gone: Iterable[str], *, scales: Mapping[str, float] = MappingProxyType({})) -> nn.Module:
    """A new model that computes what the given one computes when nothing of `gone` adds to the residual stream: a branch with
    its out-projection's bias. The given one is untouched; weights that stay are copied.

    gone: names of blocks ("encoder.0") or of branches ("decoder.1.ffn"). scales: by such a name, a factor in (0, 1] on what
    stays there, which is folded into the out-projection (or the norm behind it).
    Pre-norm blocks (T5, llama and kin) without any branch vanish from the model, which is a stock one with fewer layers where
    whole blocks are all that is missing. What stays of a post-norm block (BERT) is its norms. A stack keeps one block at least,
    and T5's encoder as many as its decoder, since transformers makes the decoder's cache by the encoder's number: where those
    are gone, the first of them stay, with nothing but their norms in them.
    Raises InputError: a name that is unknown or gone already, a scale that does not fit.
    """
    chosen = _named(model, "layers", gone)
    factors = _factors(model, scales, chosen)
    made = rebuilt(model, _emptied(model, chosen))
    for branch, factor in factors.items():
        _scale_(made, branch, factor)
    _drop_empty_blocks_(made)
    return made


def _named(model: nn.Module, argument: str, names: Iterable[str]) -> set[Branch]:
    """The branches that names of blocks and branches stand for."""
    if isinstance(names, str):
        raise InputError(f"{argument}: expected a collection of names, got the text {names!r}")
    known = {**layers(model, "block"), **layers(model, "branch")}
    found: set[Branch] = set()
    for name in names:
        if name not in known:
            raise InputError(f"{argument}: expected some of {', '.join(known)}, got {name!r}")
        found.update(known[name])
    return found


def _factors(model: nn.Module, scales: Mapping[str, float], gone: set[Branch]) -> dict[Branch, float]:
    """By branch, the factor that it is scaled by, where it is not 1."""
    found: dict[Branch, float] = {}
    for name, factor in scales.items():
        if not (math.isfinite(factor) and 0 < factor <= 1):
            raise InputError(f"scales: expected factors in (0, 1], got {factor} for {name!r}")
        for branch in _named(model, "scales", [name]):
            if branch in gone:
                raise InputError(f"scales: expected names of what stays, got {name!r}, which is deleted")
            if branch in found:
                raise InputError(f"scales: expected one factor for each branch, got a second for {branch.name!r} by {name!r}")
            found[branch] = factor
    return {branch: factor for branch, factor in found.items() if factor != 1}


def _emptied(model: nn.Module, gone: set[Branch]) -> Rebuild:
    """What of the model is rebuilt so that the branches add zeros: their linear layers keep no channel between them, and the
    out-projection no bias."""
    family, rebuild = family_of(model), Rebuild()
    for branch in gone:
        for path in branch.linears[:-1]:
            _resize(model, path, rebuild, outputs=0)
        _resize(model, branch.output, rebuild, inputs=0)
        if not branch.empty:
            branch.replaced_by_nothing(rebuild)
    heads = {branch.name: torch.empty(0, dtype=torch.int64) for branch in attentions(gone)}
    if heads and family.cut_position_bias is not None:
        family.cut_position_bias(model, heads, rebuild)
    return rebuild


def _resize(model: nn.Module, path: str, rebuild: Rebuild, *, inputs: int | None = None, outputs: int | None = None) -> None:
    """A linear layer without inputs, which has no bias either, or without outputs."""
    layer: Any = model.get_submodule(path)
    has_bias = inputs is None and layer.bias is not None
    made, read = shape_of(layer)
    shape = [read if inputs is None else inputs, made if outputs is None else outputs]
    rebuild.recipe["modules"][path] = {"linear": shape, "bias": has_bias}
    rebuild.made[f"{path}.weight"] = layer.weight.detach().new_empty(shape[1], shape[0])
    if has_bias:
        rebuild.made[f"{path}.bias"] = layer.weight.detach().new_empty(shape[1])


@torch.no_grad()
def _scale_(model: nn.Module, branch: Branch, factor: float) -> None:
    """Folds a factor on what a branch adds into the module that it comes from."""
    where = contribution(model, branch)
    module = model.get_submodule(where.path)
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    weight.copy_((weight.double() + where.offset) * factor - where.offset)
    if bias is not None:
        bias.copy_(bias.double() * factor)


def _drop_empty_blocks_(model: nn.Module) -> None:
    """Takes the blocks out of which nothing adds to the residual stream, where they do nothing else, numbers the others anew,
    and makes the config say so."""
    keep_blocks = family_of(model).keep_blocks
    if keep_blocks is None:
        return
    found = blocks(model)
    kept = _kept(model, list(found.values()))
    if all(len(numbers) == sum(block.stack == stack for block in found.values()) for stack, numbers in kept.items()):
        return
    if not keep_blocks(copy.deepcopy(model.config), kept):
        return
    renamed: dict[str, str | None] = {}
    for stack, numbers in kept.items():
        of_stack = [block for block in found.values() if block.stack == stack]
        new = {old: number for number, old in enumerate(numbers)}
        renamed |= {b.path: f"{b.layers}.{new[b.layer]}" if b.layer in new else None for b in of_stack}
        _keep_(model, of_stack[0].layers, numbers)
    configs: dict[int, Any] = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        keep_blocks(config, kept)
    whole: Any = model.config
    if hasattr(whole, "secateur"):
        whole.secateur = _renamed_recipe(model, whole.secateur, renamed)
    describe_(model, Rebuild().recipe)


def _kept(model: nn.Module, found: list[Block]) -> dict[Stack, list[int]]:
    """The numbers of the blocks that stay, by stack: the decoder first, since it says how many the encoder needs."""
    stacks: dict[Stack, list[Block]] = {}
    for block in found:
        stacks.setdefault(block.stack, []).append(block)
    kept: dict[Stack, list[int]] = {}
    for stack in sorted(stacks):  # "decoder" before "encoder".
        needed = max(1, len(kept.get("decoder", [])))
        full = [block.layer for block in stacks[stack] if any(contributes(model, branch) for branch in block.branches)]
        empty = [block.layer for block in stacks[stack] if block.layer not in full]
        kept[stack] = sorted([*full, *empty[: max(0, needed - len(full))]])
    return kept


def _keep_(model: nn.Module, path: str, numbers: list[int]) -> None:
    """Leaves these blocks of a list, which tell a cache their new numbers."""
    parent, _, name = path.rpartition(".")
    old: Any = model.get_submodule(path)
    made = nn.ModuleList([old[number] for number in numbers])
    made.training = old.training
    setattr(model.get_submodule(parent), name, made)
    for number, block in enumerate(made):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # type: ignore[assignment]


def _renamed_recipe(model: nn.Module, recipe: Mapping[str, Any], renamed: Mapping[str, str | None]) -> dict[str, Any]:
    """The recipe with the blocks' new paths, without those that are gone. Its paths may have the base model's prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    both = {**renamed, **{prefix + old: None if new is None else prefix + new for old, new in renamed.items()}}

    def rename(path: str) -> str | None:
        names = path.split(".")
        for depth in range(len(names), 0, -1):
            old = ".".join(names[:depth])
            if old in both:
                new = both[old]
                return None if new is None else ".".join([new, *names[depth:]])
        return path

    made: dict[str, Any] = {}
    for part, entries in recipe.items():
        pairs = [(rename(path), path) for path in entries]
        if isinstance(entries, Mapping):
            made[part] = {new: entries[old] for new, old in pairs if new is not None}
        else:
            made[part] = [new for new, _ in pairs if new is not None]
    return made
