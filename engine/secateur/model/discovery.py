"""The sites of a model, which its family tells, and the fingerprint that ties scores and plans to the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from torch import nn

from secateur.model.branches import Branch, Port
from secateur.model.families import branches, family_of
from secateur.model.linear_layers import flat_names, is_kind, weight_of
from secateur.model.modeling import GatherLinear, LowRankLinear, ScatterLinear
from secateur.model.offloading import named_parameters
from secateur.model.ordinary import require_model, require_ordinary
from secateur.model.sites import AttentionUnit, InStock, Site, Sites, Unit, branch_name, is_head, selected
from secateur.support.errors import InputError


def sites(model: nn.Module, *, unit: AttentionUnit = "head", select: str | None = None) -> list[Site]:
    """Return the prunable sites of a model, in the order of its forward pass.

    Args:
        model: The model.
        unit: The unit that is removed from attention: "head" (a key-value head with its query heads under GQA, a query head
            under MQA) or "channel" (Q and K together, V and O together).
        select: Which sites: alternatives between commas. Each is a conjunction of words between points, as in site names:
            "ffn", "encoder.attention", "decoder.cross,encoder.ffn.0-3". Words are encoder, decoder, ffn, attention, self,
            cross, qk, vo, a layer, or a range of layers. None for all sites.

    Raises:
        InputError: The family or the unit is unknown; the selection is malformed or empty; the model's attention has lost
            channels already; or the model has no units left, or is none that `require_ordinary` takes.
    """
    if unit not in ("head", "channel"):
        raise InputError(f"unit: expected 'head' or 'channel', got {unit!r}")
    if select is not None and not isinstance(select, str):
        raise InputError(f"select: expected words such as 'encoder.ffn', got {select!r}")
    require_ordinary(model)
    for path, module in model.named_modules():
        if is_kind(module, LowRankLinear):
            raise InputError(f"model: {path} has been factorised; prune the dense model instead")
        if is_kind(module, ScatterLinear) or is_kind(module, GatherLinear):
            raise InputError(f"model: {path} has lost attention channels already; prune the dense model with one plan instead")
    of_model = branches(model).values()
    of_branches = [
        _site(model, branch, name, kind, count)
        for branch in of_model
        for name, (kind, count) in branch.sites(unit).items()
        if count
    ]
    if not of_branches:
        raise InputError("model: expected one with units left to remove, got one whose branches are all empty")
    refused = {branch.channels_refused for branch in of_model} - {None}
    why = [f"; no site is what Q/K channels are: {reason}" for reason in refused]
    return Sites(of_branches if select is None else selected(of_branches, select, "".join(why)))


def branches_of(model: nn.Module, chosen: Iterable[Site]) -> dict[Site, Branch]:
    """Return the branch that each site belongs to. Raises InputError for a site that the model lacks or has of other units."""
    by_name, owners = branches(model), {}
    units: tuple[AttentionUnit, ...] = ("head", "channel")
    for site in chosen:
        branch = by_name.get(branch_name(site.name))
        of_branch = [] if branch is None else [branch.sites(unit).get(site.name) for unit in units]
        if branch is None or not any(of_branch):
            raise InputError(f"sites: expected sites of this model, such as {next(iter(by_name))!r}, got {site.name!r}")
        if (site.unit, site.units) not in of_branch:
            known = " or ".join(f"{count} {unit}s" for unit, count in dict.fromkeys(filter(None, of_branch)))
            raise InputError(f"sites: expected {known} at {site.name!r} of this model, got {site.units} {site.unit}s")
        owners[site] = branch
    return owners


def scored_ports(model: nn.Module, chosen: Iterable[Site]) -> dict[Site, tuple[Port, ...]]:
    """Return the ports where each site's activations are observed."""
    return {site: branch.observed_at(site.unit) for site, branch in branches_of(model, chosen).items()}


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the architecture, its branches (heads and widths) and the shapes of all parameters.

    Values of parameters are not part of it. Scores and plans belong to all models that share it, such as fine-tuned copies of
    one checkpoint.
    """
    require_model(model)
    flat = flat_names(model)
    shapes = dict(sorted((flat.get(name, name), list(p.shape)) for name, p in named_parameters(model)))
    text = json.dumps([model.config.model_type, repr(branches(model)), shapes])  # type: ignore[union-attr]
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def config_digest(model: nn.Module) -> str:
    """Return a short hash of the model's config and of its generation settings, where they differ from the defaults.

    The dtype, the folder's name and versions are not part of it.
    """
    configs: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
    known = [config.to_diff_dict() if hasattr(config, "to_diff_dict") else {} for config in configs]
    documents = [json.loads(json.dumps(document, default=str)) for document in known]
    for document in documents:
        for name in ("_name_or_path", "name_or_path", "dtype", "torch_dtype", "transformers_version"):
            document.pop(name, None)
    return hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()[:16]


def _site(model: nn.Module, branch: Branch, name: str, unit: Unit, count: int) -> Site:
    parameters = flops = source_flops = 0.0
    for port in branch.cut_at(unit):
        module = model.get_submodule(port.path)
        weight = weight_of(module)
        per_unit = port.map.size / count
        other = weight.shape[1] if port.side == "output" else weight.shape[0]
        has_bias = port.side == "output" and getattr(module, "bias", None) is not None
        parameters += per_unit * (other + has_bias)
        if port.path in branch.source_linears:
            source_flops += 2 * per_unit * other
        else:
            flops += 2 * per_unit * other
    core_flops = branch.core_flops(unit) / count
    heads = family_of(model).heads_in_stock if is_head(unit) else "free"
    # Cross-attention reads no table of positions.
    in_stock: InStock = "free" if heads == "shared" and branch.kind == "cross_attention" else heads
    return Site(
        name, branch.kind, branch.stack, branch.layer, unit, count, branch.groups, parameters, flops, source_flops, core_flops,
        in_stock,
    )  # fmt: skip
