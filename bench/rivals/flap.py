"""FLAP (An et al. 2024): remove the units whose outputs fluctuate least, in one ranking over all layers.

Biases replace the mean output of the removed units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from bench.support.budgeted import all_flops, plan_of, unit_flops
from bench.support.inputs import each_input
from secateur.attribution.criteria import Fluctuation
from secateur.model.discovery import branches_of, sites
from secateur.model.sites import Site
from secateur.tasks import Task

CHANNELS = "ffn,vo"  # All channels that out-projections read.


def flap(
    model: nn.Module,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    flops: float,
    *,
    scores: secateur.Scores | None = None,
    compensate: bool = True,
) -> nn.Module:
    """Return the model pruned to a share of its layers' FLOPs by FLAP.

    Scores are standardised within each module, and one ranking covers all layers and modules (the adaptive structure AL-AM).
    The code is written from the paper. The paper counts the weights of a head or a neuron; this code counts FLOPs, because the
    budget is one of FLOPs. Each layer keeps at least one head and one neuron.

    Args:
        model: The dense model.
        task: The task.
        rows: The calibration examples.
        flops: The budget, as a share of the layers' FLOPs.
        scores: Scores of channels by `Fluctuation()`. They are computed if not given.
        compensate: Add the mean output of the removed units to the out-projection's bias. The bias is added where the
            architecture has none (T5), as FLAP does for Llama.

    Reference: arXiv 2312.11983.
    """
    scores = scores or secateur.attribute(model, task, rows, criterion=Fluctuation(), unit="channel", select=CHANNELS)
    kept = _ranked(_standardised(model, scores), scores, flops)
    plan = plan_of(scores, kept, secateur.Budget("flops", flops))
    pruned = secateur.prune(model, plan)
    if compensate:
        _compensate_(pruned, model, task, rows, plan)
    return pruned


def _standardised(model: nn.Module, scores: secateur.Scores) -> dict[Site, Tensor]:
    """Return each unit's standardised score: (score - mean) / standard deviation in its module.

    A head has the mean of its channels.
    """
    scores_by_site = {}
    for site in sites(model):
        channel_scores = scores[site.name if site.kind == "ffn" else f"{site.name}.vo"]
        standardised = (channel_scores - channel_scores.mean()) / channel_scores.std()
        scores_by_site[site] = standardised.view(site.units, -1).mean(1)  # [units, channels of a unit] -> [units]
    return scores_by_site


def _ranked(worth: Mapping[Site, Tensor], scores: secateur.Scores, flops: float) -> dict[Site, Tensor]:
    """Return the best units over all sites. The budget limits their number."""
    kept = {site: torch.zeros(site.units, dtype=torch.bool) for site in worth}
    budget = flops * all_flops(scores)
    for site, values in worth.items():
        kept[site][values.argmax()] = True
        budget -= unit_flops(site, scores)
    candidates = [(value, site, unit) for site, values in worth.items() for unit, value in enumerate(values.tolist())]
    for _, site, unit in sorted(candidates, key=lambda candidate: -candidate[0]):
        price = unit_flops(site, scores)
        if not kept[site][unit] and price <= budget:
            kept[site][unit] = True
            budget -= price
    return {site: mask.nonzero().flatten() for site, mask in kept.items()}


def _compensate_(pruned: nn.Module, model: nn.Module, task: Task, rows: Any, plan: secateur.Plan) -> None:
    """Add W m to each out-projection's bias. m holds the removed units' mean activations in the dense model."""
    means = _mean_inputs(model, task, rows, plan.sites)
    for site, branch in branches_of(model, plan.sites).items():
        removed = torch.ones(site.units, dtype=torch.bool)
        removed[plan[site.name]] = False
        channels = branch.cut_at(site.unit)[-1].map.expand(removed)
        weight = model.get_submodule(branch.output).get_parameter("weight").detach().double()
        lost_output = weight[:, channels] @ means[site][channels]
        projection = pruned.get_submodule(branch.output)
        if getattr(projection, "bias", None) is None:
            projection.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=projection.get_parameter("weight").dtype))
        with torch.no_grad():
            projection.get_parameter("bias").add_(lost_output)


def _mean_inputs(model: nn.Module, task: Task, rows: Any, chosen: Sequence[Site]) -> dict[Site, Tensor]:
    """Return the mean input of each out-projection over real tokens, float64 [channels]."""
    sums, counts = dict.fromkeys(chosen, torch.zeros((), dtype=torch.float64)), dict.fromkeys(chosen, 0)

    def add(site: Site, inputs: Tensor) -> None:
        sums[site] = sums[site] + inputs.sum(0)
        counts[site] += len(inputs)

    each_input(model, task, rows, chosen, add)
    return {site: sums[site] / counts[site] for site in chosen}
