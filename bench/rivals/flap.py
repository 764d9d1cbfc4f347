"""FLAP (An et al. 2024): units whose outputs fluctuate least go, ranked across all layers; biases make up for their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from bench.support.budgeted import all_flops, plan_of, unit_flops
from secateur.attribution.criteria import Fluctuation
from secateur.model.discovery import branches_of, sites
from secateur.model.hooks import observed
from secateur.model.sites import Site
from secateur.model.undisturbed import undisturbed
from secateur.tasks import Task
from secateur.tasks.batches import model_device

CHANNELS = "ffn,vo"  # Every channel that an out-projection reads.


def flap(
    model: nn.Module,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    flops: float,
    *,
    scores: secateur.Scores | None = None,
    compensate: bool = True,
) -> nn.Module:
    """The model pruned to this share of its layers' FLOPs as in arXiv 2312.11983, with its adaptive structure (AL-AM): scores
    standardised in each module, one ranking for all layers and modules.

    Written from the paper, where each head and neuron counts by its weights: here by its FLOPs, as the budget is one of FLOPs.
    Each layer keeps one head and one neuron at least. compensate: what the removed units give on the average goes into the
    out-projection's bias, which is added where the architecture has none (T5), as FLAP does for Llama. scores: by
    Fluctuation(), of channels.
    """
    scores = scores or secateur.attribute(model, task, rows, criterion=Fluctuation(), unit="channel", select=CHANNELS)
    kept = _ranked(_standardised(model, scores), scores, flops)
    plan = plan_of(scores, kept, secateur.Budget("flops", flops))
    pruned = secateur.prune(model, plan)
    if compensate:
        _compensate_(pruned, model, task, rows, plan)
    return pruned


def _standardised(model: nn.Module, scores: secateur.Scores) -> dict[Site, Tensor]:
    """Each module's channels minus their mean, over their standard deviation; a head has the mean of its channels."""
    found = {}
    for site in sites(model):
        of_channels = scores[site.name if site.kind == "ffn" else f"{site.name}.vo"]
        standard = (of_channels - of_channels.mean()) / of_channels.std()
        found[site] = standard.view(site.units, -1).mean(1)
    return found


def _ranked(worth: Mapping[Site, Tensor], scores: secateur.Scores, flops: float) -> dict[Site, Tensor]:
    """The best units of all sites together, as many as the budget has room for."""
    kept = {site: torch.zeros(site.units, dtype=torch.bool) for site in worth}
    budget = flops * all_flops(scores)
    for site, values in worth.items():
        kept[site][values.argmax()] = True
        budget -= unit_flops(site, scores)
    rest = [(value, site, unit) for site, values in worth.items() for unit, value in enumerate(values.tolist())]
    for _, site, unit in sorted(rest, key=lambda each: -each[0]):
        price = unit_flops(site, scores)
        if not kept[site][unit] and price <= budget:
            kept[site][unit] = True
            budget -= price
    return {site: mask.nonzero().flatten() for site, mask in kept.items()}


def _compensate_(pruned: nn.Module, model: nn.Module, task: Task, rows: Any, plan: secateur.Plan) -> None:
    """Adds W m to each out-projection's bias, m being the dense model's mean inputs of the removed units."""
    means = _mean_inputs(model, task, rows, plan.sites)
    for site, branch in branches_of(model, plan.sites).items():
        removed = torch.ones(site.units, dtype=torch.bool)
        removed[plan[site.name]] = False
        channels = branch.cut_at(site.unit)[-1].map.expand(removed)
        weight = model.get_submodule(branch.output).get_parameter("weight").detach().double()
        lost = weight[:, channels] @ means[site][channels]
        layer = pruned.get_submodule(branch.output)
        if getattr(layer, "bias", None) is None:
            layer.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=layer.get_parameter("weight").dtype))
        with torch.no_grad():
            layer.get_parameter("bias").add_(lost)


def _mean_inputs(model: nn.Module, task: Task, rows: Any, found: Sequence[Site]) -> dict[Site, Tensor]:
    """The mean over real tokens of what each out-projection reads, float64 [channels]."""
    owners = branches_of(model, found)
    ports = {branch.cut_at(site.unit)[-1]: site for site, branch in owners.items()}
    has_encoder = any(site.stack == "encoder" for site in found)
    sums, counts = dict.fromkeys(found, torch.zeros((), dtype=torch.float64)), dict.fromkeys(found, 0)

    def add(site: Site, real: Tensor, activation: Tensor) -> None:
        sums[site] = sums[site] + activation[real].double().sum(0)
        counts[site] += int(real.sum())

    with undisturbed(model), torch.no_grad():
        for batch in task.batches(task.items(model, list(rows)), model_device(model), 4096):
            real = {stack: batch.real(target=stack == "decoder" and has_encoder) for stack in ("encoder", "decoder")}
            with observed(model, {port: partial(add, site, real[site.stack]) for port, site in ports.items()}):
                task.logits(model, batch)
    return {site: sums[site] / counts[site] for site in found}
