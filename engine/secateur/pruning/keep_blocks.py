"""Blocks taken out of a model as modules. The others get new numbers, and the config describes the result."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.model.blocks import blocks
from secateur.model.branches import Branch
from secateur.model.families import family_of
from secateur.model.recipe import Rebuild
from secateur.model.removed_blocks import staying
from secateur.model.sites import Stack, branch_name
from secateur.planning.plan import Plan
from secateur.pruning.describe import describe_
from secateur.support.errors import InputError


def removed_branches(model: nn.Module, plan: Plan) -> dict[str, Branch]:
    """Return the branches by name of the blocks that a plan removes.

    Raises:
        InputError: The model lacks a block, or a site of it is not in the plan; or no config describes the model without them.
    """
    if not plan.removed_blocks:
        return {}
    staying(model, plan.removed_blocks)
    of_model, planned = blocks(model), {branch_name(site) for site in plan}
    branches = {branch.name: branch for name in plan.removed_blocks for branch in of_model[name].branches}
    missing = next((name for name, branch in branches.items() if not branch.empty and name not in planned), None)
    if missing is not None:
        raise InputError(f"removed_blocks: expected blocks whose sites are all in the plan, got one whose {missing} is not")
    return branches


def remove_blocks_(model: nn.Module, removed: Collection[str]) -> None:
    """Remove blocks of a model, in place. Raises InputError as `staying` does."""
    if removed:
        keep_blocks_(model, staying(model, removed))


def keep_blocks_(model: nn.Module, kept: Mapping[Stack, Sequence[int]]) -> None:
    """Keep some blocks of a model, in place. The model stays as it is where no config describes the result.

    Args:
        model: The model.
        kept: The numbers of the blocks that stay, by stack.
    """
    keep_blocks, all_blocks = family_of(model).keep_blocks, blocks(model).values()
    if all(len(numbers) == sum(block.stack == stack for block in all_blocks) for stack, numbers in kept.items()):
        return
    if keep_blocks is None or not keep_blocks(copy.deepcopy(model.config), kept):
        return
    renamed: dict[str, str | None] = {}
    for stack, numbers in kept.items():
        of_stack = [block for block in all_blocks if block.stack == stack]
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


def _keep_(model: nn.Module, path: str, numbers: Sequence[int]) -> None:
    """Keep these blocks of a list, and give modules that tell a cache their number the new one."""
    parent, _, name = path.rpartition(".")
    old: Any = model.get_submodule(path)
    kept = nn.ModuleList([old[number] for number in numbers])
    kept.training = old.training
    setattr(model.get_submodule(parent), name, kept)
    for number, block in enumerate(kept):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # type: ignore[assignment]


def _renamed_recipe(model: nn.Module, recipe: Mapping[str, Any], renamed: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the recipe with the blocks' new paths, without deleted blocks. Paths may have the base model's prefix."""
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

    new_recipe: dict[str, Any] = {}
    for part, entries in recipe.items():
        pairs = [(rename(path), path) for path in entries]
        if isinstance(entries, Mapping):
            new_recipe[part] = {new: entries[old] for new, old in pairs if new is not None}
        else:
            new_recipe[part] = [new for new, _ in pairs if new is not None]
    return new_recipe
