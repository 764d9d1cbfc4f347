"""What methods of pruning under one budget share: FLOPs of a model's layers as built, and plans out of chosen units."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

import secateur
from secateur.model import cost
from secateur.model.families import branches
from secateur.model.sites import Site
from secateur.planning.plan import Spread


def layer_flops(model: nn.Module, tokens: Mapping[str, float]) -> float:
    """Multiply-adds x 2 of a model's layers for one example of mean length, by `cost`'s formula, counted on the weights that
    the model has: so it holds for whatever any method has built."""
    total = 0.0
    for branch in branches(model).values():
        own, source = tokens[branch.stack], tokens["encoder"]
        for path in branch.linears:
            tokens_read = source if path in branch.source_linears else own
            total += 2 * model.get_submodule(path).get_parameter("weight").numel() * tokens_read
        total += branch.core_flops("head") * own * tokens[branch.source]
    return total


def unit_flops(site: Site, scores: secateur.Scores) -> float:
    """FLOPs of one unit of a site for an example of mean length."""
    return cost.unit_cost(site, "flops", scores.tokens)


def all_flops(scores: secateur.Scores) -> float:
    """FLOPs of the dense model's layers for an example of mean length."""
    return sum(unit_flops(site, scores) * site.units for site in scores.all_sites)


def plan_of(scores: secateur.Scores, kept: Mapping[Site, Tensor], budget: secateur.Budget | None) -> secateur.Plan:
    """A plan that keeps these units; the scores tell the model, its layers and the lengths."""
    sites = tuple(kept)
    counts = {site.name: len(units) for site, units in kept.items()}
    left = {kind: cost.remaining(scores.all_sites, sites, counts, kind, scores.tokens) for kind in ("flops", "params")}
    units = {site.name: stay.sort().values for site, stay in kept.items()}
    return secateur.Plan(units, sites, scores.fingerprint, budget, Spread(left))
