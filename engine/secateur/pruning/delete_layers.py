"""delete_layers: remove whole blocks or single branches physically, as if their outputs were zero."""

from __future__ import annotations

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
from secateur.model.removed_blocks import fewest_blocks
from secateur.model.sites import Stack
from secateur.pruning.keep_blocks import keep_blocks_
from secateur.pruning.prune import rebuilt
from secateur.support.errors import InputError
from secateur.support.fields import shown


@torch.inference_mode(False)  # No inference tensors: the new model may outlive the caller's inference mode.
def delete_layers(model: nn.Module, gone: Iterable[str], *, scales: Mapping[str, float] = MappingProxyType({})) -> nn.Module:
    """Return a new model that computes what the given one computes when the deleted layers add nothing to the residual stream.

    A branch goes with its out-projection's bias. No logit changes but by rounding. Pre-norm blocks (T5, llama and kin) without
    any branch vanish from the model. Where only whole blocks are missing, the result is a stock model with fewer layers. Of a
    post-norm block (BERT) its norms stay. A stack keeps one block at least, and T5's encoder keeps as many as its decoder,
    because transformers makes the decoder's cache by the encoder's number of layers: where those are gone, the first of them
    stay, with nothing but their norms in them.

    Args:
        model: The dense model. It stays unchanged; weights that stay are copied.
        gone: The names of blocks ("encoder.0") or of branches ("decoder.1.ffn") to delete.
        scales: By the name of a block or branch that stays, a factor in (0, 1] on its output. The factor is folded into the
            out-projection, or into the norm behind it.

    Raises:
        InputError: A name is unknown or deleted already, or a scale does not fit.
    """
    chosen = _named(model, "layers", gone)
    factors = _factors(model, scales, chosen)
    smaller = rebuilt(model, _emptied(model, chosen))
    for branch, factor in factors.items():
        _scale_(smaller, branch, factor)
    _drop_empty_blocks_(smaller)
    return smaller


def _named(model: nn.Module, argument: str, names: Iterable[str]) -> set[Branch]:
    """Return the branches that names of blocks and branches stand for."""
    if isinstance(names, str):
        raise InputError(f"{argument}: expected a collection of names, got the text {names!r}")
    if not isinstance(names, Iterable):
        raise InputError(f"{argument}: expected a collection of names, got {shown(names)}")
    known = {**layers(model, "block"), **layers(model, "branch")}
    branches: set[Branch] = set()
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise InputError(f"{argument}: expected some of {', '.join(known)}, got {name!r}")
        branches.update(known[name])
    return branches


def _factors(model: nn.Module, scales: Mapping[str, float], gone: set[Branch]) -> dict[Branch, float]:
    """Return the factors by branch that are not 1."""
    factors: dict[Branch, float] = {}
    if not isinstance(scales, Mapping):
        raise InputError(f"scales: expected factors by name, got {shown(scales)}")
    for name, factor in scales.items():
        try:
            fits = math.isfinite(factor) and 0 < factor <= 1
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise InputError(f"scales: expected factors in (0, 1], got {shown(factor)} for {name!r}")
        for branch in _named(model, "scales", [name]):
            if branch in gone:
                raise InputError(f"scales: expected names of what stays, got {name!r}, which is deleted")
            if branch in factors:
                raise InputError(f"scales: expected one factor for each branch, got a second for {branch.name!r} by {name!r}")
            factors[branch] = factor
    return {branch: factor for branch, factor in factors.items() if factor != 1}


def _emptied(model: nn.Module, gone: set[Branch]) -> Rebuild:
    """Return the rebuild after which the branches add zeros.

    Their linear layers keep no channel between them, and the out-projection keeps no bias.
    """
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
    """Note that a linear layer loses all inputs and its bias, or all outputs."""
    layer: Any = model.get_submodule(path)
    has_bias = inputs is None and layer.bias is not None
    old_outputs, old_inputs = shape_of(layer)
    shape = [old_inputs if inputs is None else inputs, old_outputs if outputs is None else outputs]
    rebuild.recipe["modules"][path] = {"linear": shape, "bias": has_bias}
    rebuild.new[f"{path}.weight"] = layer.weight.detach().new_empty(shape[1], shape[0])
    if has_bias:
        rebuild.new[f"{path}.bias"] = layer.weight.detach().new_empty(shape[1])


@torch.no_grad()
def _scale_(model: nn.Module, branch: Branch, factor: float) -> None:
    """Fold a factor on the output of a branch into the module whose output is added to the residual stream."""
    where = contribution(model, branch)
    module = model.get_submodule(where.path)
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    weight.copy_((weight.double() + where.offset) * factor - where.offset)
    if bias is not None:
        bias.copy_(bias.double() * factor)


def _drop_empty_blocks_(model: nn.Module) -> None:
    """Remove the blocks that add nothing to the residual stream and do nothing else."""
    family = family_of(model)
    if not family.post_norm(model.config):
        keep_blocks_(model, _kept(model))


def _kept(model: nn.Module) -> dict[Stack, list[int]]:
    """Return the numbers of the blocks that stay, by stack. Empty ones stay where the stack would be too small without them."""
    stacks: dict[Stack, list[Block]] = {}
    for block in blocks(model).values():
        stacks.setdefault(block.stack, []).append(block)
    kept: dict[Stack, list[int]] = {}
    for stack in sorted(stacks):  # "decoder" before "encoder".
        full = [block.layer for block in stacks[stack] if any(contributes(model, branch) for branch in block.branches)]
        empty = [block.layer for block in stacks[stack] if block.layer not in full]
        kept[stack] = sorted([*full, *empty[: max(0, fewest_blocks(stack, kept.get("decoder", [])) - len(full))]])
    return kept
