"""Shared by pruning methods under one budget: the FLOPs of a built model's layers, and plans from chosen units."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

import secateur
from secateur.model import cost
from secateur.model.families import branches
from secateur.model.sites import Site
from secateur.planning.plan import Spread


def layer_flops(model: nn.Module, tokens: Mapping[str, float]) -> float:
    """Return the FLOPs of a model's layers (two per multiply-add) for one example of mean length.

    The formula is the one of `cost`. It counts the weights that the model has, so it is valid for a model from any method.
    """
    total = 0.0
    for branch in branches(model).values():
        own_tokens, encoder_tokens = tokens[branch.stack], tokens["encoder"]
        for path in branch.linears:
            weight = model.get_submodule(path).get_parameter("weight")
            total += 2 * weight.numel() * (encoder_tokens if path in branch.source_linears else own_tokens)
        total += branch.core_flops("head") * own_tokens * tokens[branch.source]
    return total


def unit_flops(site: Site, scores: secateur.Scores) -> float:
    """Return the FLOPs of one unit of a site for an example of mean length."""
    return cost.unit_cost(site, "flops", scores.tokens)


def all_flops(scores: secateur.Scores) -> float:
    """Return the FLOPs of the dense model's layers for an example of mean length."""
    return sum(unit_flops(site, scores) * site.units for site in scores.all_sites)


def plan_of(scores: secateur.Scores, kept: Mapping[Site, Tensor], budget: secateur.Budget | None) -> secateur.Plan:
    """Return a plan that keeps these units. The scores supply the model's fingerprint, its layers and the mean lengths."""
    sites = tuple(kept)
    counts = {site.name: len(units) for site, units in kept.items()}
    remaining = {kind: cost.remaining(scores.all_sites, sites, counts, kind, scores.tokens) for kind in ("flops", "params")}
    units = {site.name: indices.sort().values for site, indices in kept.items()}
    return secateur.Plan(units, sites, scores.fingerprint, budget, Spread(remaining))
