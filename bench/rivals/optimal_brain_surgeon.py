"""ZipLM (Kurtic et al. 2023) and Týr-the-Pruner (Li et al. 2025): the Optimal Brain Surgeon removes units one by one.

Both prune each layer at several levels and then search for the level of each layer. The code is written from the papers.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secateur
from bench.support.budgeted import all_flops, plan_of, unit_flops
from bench.support.inputs import each_input
from secateur.attribution.criteria import RandomScores
from secateur.measuring.divergence import divergence_of, target_logits
from secateur.model.discovery import branches_of, sites
from secateur.model.sites import Site
from secateur.model.undisturbed import undisturbed
from secateur.tasks import Batch, Task
from secateur.tasks.batches import model_device

DAMP = 0.01  # The dampening, as a share of the mean of the Hessian's diagonal.
SHRINK = 0.9  # Each level of an FFN has this share of the neurons of the level before (ZipLM, Sec. 3.2).
STEPS, MUTATED = 100, 0.1  # Steps of ZipLM's search (the paper takes 1,000), and the share of coefficients that a step changes.
GENERATIONS, OFFSPRING = 10, 10  # Týr's search: 100 plans too, so that both spend the same.
SEARCHED = 64  # The most calibration examples that a search compares plans on.
_BINS = 2000  # The budget is cut into so many equal parts for the dynamic programme.


@dataclass
class Levels:
    """A site's levels: what is left if more and more of its units are removed, one at a time.

    Attributes:
        site: The site.
        weight: The dense out-projection's weight, float64 [d, channels].
        hessian: sum x x^T over tokens of the inputs of the out-projection, dampened, float64 [channels, channels].
        order: The units in the order of their removal.
        errors: By the number of kept units, |W_kept X - W X| / |W X|.
        counts: The numbers of kept units that are levels, from all to none.
    """

    site: Site
    weight: Tensor
    hessian: Tensor
    order: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def kept(self, count: int) -> Tensor:
        """Return the units that are kept at a level [count], sorted."""
        removed = set(self.order[: self.site.units - count])
        return torch.tensor([unit for unit in range(self.site.units) if unit not in removed], dtype=torch.int64)

    def channels(self, units: Tensor) -> Tensor:
        """Return the channels of units."""
        each = self.weight.shape[1] // self.site.units
        return (units[:, None] * each + torch.arange(each)).flatten()

    def updated(self, count: int) -> Tensor:
        """Return the weight at a level [d, channels], with zeros at removed units.

        The updates of all removals together are the least-squares weights of the kept channels (ZipLM, Eq. 2).
        """
        chosen, weight = self.channels(self.kept(count)), torch.zeros_like(self.weight)
        if len(chosen):
            crossed = self.weight @ self.hessian[:, chosen]  # [d, chosen]
            factor = torch.linalg.cholesky(self.hessian[chosen][:, chosen])
            weight[:, chosen] = torch.cholesky_solve(crossed.T, factor).T
        return weight

    def remove_all(self) -> None:
        """Remove one unit after the other: the one whose removal adds the least error (ZipLM, Alg. 1)."""
        units, each = self.site.units, self.weight.shape[1] // self.site.units
        weight, inverse = self.weight.clone(), torch.cholesky_inverse(torch.linalg.cholesky(self.hessian))
        size = float(((self.weight @ self.hessian) * self.weight).sum())
        left, lost = torch.ones(units, dtype=torch.bool), 0.0
        self.errors = [0.0] * (units + 1)
        for count in range(units - 1, -1, -1):
            blocks = inverse.view(units, each, units, each)[torch.arange(units), :, torch.arange(units)]  # [units, each, each]
            of_unit = weight.view(-1, units, each).transpose(0, 1)  # [units, d, each]
            blocks = torch.where(left[:, None, None], blocks, torch.eye(each, dtype=blocks.dtype))
            solved = torch.linalg.solve(blocks, of_unit.transpose(1, 2))  # [units, each, d]
            costs = (of_unit.transpose(1, 2) * solved).sum((1, 2)).masked_fill(~left, torch.inf)
            unit = int(costs.argmin())
            columns = slice(unit * each, (unit + 1) * each)
            lost += float(costs[unit])
            rows = inverse[columns].clone()
            weight -= solved[unit].T @ rows
            inverse -= rows.T @ torch.linalg.solve(blocks[unit], rows)
            left[unit] = False
            weight[:, columns] = 0.0
            self.order.append(unit)
            self.errors[count] = (max(lost, 0.0) / size) ** 0.5
        self.counts = _levels(self.site)


def _levels(site: Site) -> list[int]:
    """Return the numbers of kept units that a search may choose: each number of heads, or shares of the neurons."""
    if site.kind != "ffn":
        return list(range(site.units, -1, -1))
    counts = [site.units]
    while counts[-1] > max(1, site.units // 50):
        counts.append(min(counts[-1] - 1, round(counts[-1] * SHRINK)))
    return [*counts, 0]


Choice = dict[Site, int]  # By site, the number of kept units.


class _Search:
    """Everything that both searches need: the levels of all sites, their costs, and the loss of a choice."""

    def __init__(self, model: nn.Module, task: Task, rows: Sequence[Mapping[str, Any]], flops: float) -> None:
        self.model, self.task = model, task
        # Random scores need no pass over the model. They give the mean lengths of the examples, which weight FLOPs.
        self.scores = secateur.attribute(model, task, rows, criterion=RandomScores())
        self.cost = {site: unit_flops(site, self.scores) for site in self.scores.sites}
        self.budget = flops * all_flops(self.scores)
        self.levels = measured(model, task, rows)
        items = task.items(model, [dict(row) for row in rows[:SEARCHED]])
        self.batches: list[Batch] = list(task.batches(items, model_device(model), 4096))
        with undisturbed(model), torch.inference_mode():
            self.dense = [target_logits(model, task, batch) for batch in self.batches]
        self.trial = copy.deepcopy(model)
        self._weights: dict[tuple[Site, int], Tensor] = {}

    def spent(self, choice: Choice) -> float:
        """Return the FLOPs of a choice."""
        return sum(self.cost[site] * count for site, count in choice.items())

    def apply_(self, choice: Choice) -> None:
        """Give the trial model the updated weights of a choice."""
        branch_of = branches_of(self.trial, list(choice))
        with torch.no_grad():
            for site, count in choice.items():
                if (site, count) not in self._weights:
                    self._weights[site, count] = self.levels[site].updated(count)
                weight = self.trial.get_submodule(branch_of[site].output).get_parameter("weight")
                weight.copy_(self._weights[site, count])

    def loss(self, choice: Choice) -> float:
        """Return the divergence of a choice's predictions from the dense model's, in nats for all examples."""
        self.apply_(choice)
        with undisturbed(self.trial), torch.inference_mode():
            logits = (target_logits(self.trial, self.task, batch) for batch in self.batches)
            return sum(float(divergence_of(d, own).sum()) for d, own in zip(self.dense, logits, strict=True))

    def pruned(self, choice: Choice, flops: float) -> nn.Module:
        """Return the model pruned by a choice."""
        self.apply_(choice)
        kept = {site: self.levels[site].kept(count) for site, count in choice.items()}
        return secateur.prune(self.trial, plan_of(self.scores, kept, secateur.Budget("flops", flops)))


def ziplm(
    model: nn.Module, task: Task, rows: Sequence[Mapping[str, Any]], flops: float, *, steps: int = STEPS, seed: int = 0
) -> nn.Module:
    """Return the model pruned to a share of its layers' FLOPs by one-shot ZipLM.

    Each layer's error at each level is known. A dynamic programme finds the levels with the least sum of coefficient * error
    within the budget. The search changes coefficients at random and keeps those that bring the predictions nearer to the dense
    model's (SPDY). The paper's budget is a measured runtime; here it is FLOPs, as for all methods.

    Args:
        model: The dense model.
        task: The task.
        rows: The calibration examples.
        flops: The budget, as a share of the layers' FLOPs.
        steps: Steps of the search.
        seed: The seed of the random changes.

    Reference: arXiv 2302.04089; SPDY: Frantar and Alistarh 2022, arXiv 2201.13096.
    """
    search, chance = _Search(model, task, rows, flops), random.Random(seed)
    factors = dict.fromkeys(search.levels, 1.0)
    best = _programme(search, factors)
    least = search.loss(best)
    for _ in range(steps):
        changed = {site: 10 ** chance.uniform(-1, 1) if chance.random() < MUTATED else old for site, old in factors.items()}
        choice = _programme(search, changed)
        if choice != best and (loss := search.loss(choice)) < least:
            best, least, factors = choice, loss, changed
    return search.pruned(best, flops)


def tyr(model: nn.Module, task: Task, rows: Sequence[Mapping[str, Any]], flops: float, *, seed: int = 0) -> nn.Module:
    """Return the model pruned to a share of its layers' FLOPs by a search as in Týr-the-Pruner.

    The start gives all layers the same share. In each generation, offspring move a level's worth of budget from one layer to
    another, and the one whose predictions are nearest to the dense model's survives (evolutionary search). The paper prunes
    the layers again around the survivor with finer levels; here the levels are fine from the start.

    Args:
        model: The dense model.
        task: The task.
        rows: The calibration examples.
        flops: The budget, as a share of the layers' FLOPs.
        seed: The seed of the moves.

    Reference: arXiv 2503.09657.
    """
    search, chance = _Search(model, task, rows, flops), random.Random(seed)
    best = {site: max(count for count in of.counts if count <= flops * site.units) for site, of in search.levels.items()}
    best = _filled(search, best, chance)
    least = search.loss(best)
    for _ in range(GENERATIONS):
        for choice in [_moved(search, best, chance) for _ in range(OFFSPRING)]:
            if choice != best and (loss := search.loss(choice)) < least:
                best, least = choice, loss
    return search.pruned(best, flops)


def _moved(search: _Search, choice: Choice, chance: random.Random) -> Choice:
    """Return a choice with one to three sites a level lower, and the FLOPs that this saves spent on others."""
    changed = dict(choice)
    for site in chance.sample(list(choice), chance.randint(1, 3)):
        counts = search.levels[site].counts
        changed[site] = counts[min(counts.index(choice[site]) + chance.randint(1, 3), len(counts) - 1)]
    return _filled(search, changed, chance)


def _filled(search: _Search, choice: Choice, chance: random.Random) -> Choice:
    """Return a choice with sites, at random, a level higher for as long as the budget allows."""
    filled, waiting = dict(choice), list(choice)
    while waiting:
        site = chance.choice(waiting)
        counts = search.levels[site].counts
        above = counts[max(counts.index(filled[site]) - 1, 0)]
        more = search.cost[site] * (above - filled[site])
        if above > filled[site] and search.spent(filled) + more <= search.budget:
            filled[site] = above
        else:
            waiting.remove(site)
    return filled


def _programme(search: _Search, factors: Mapping[Site, float]) -> Choice:
    """Return the levels with the least sum of factor * squared error whose FLOPs fit into the budget."""
    width = search.budget / _BINS
    least = np.zeros(_BINS + 1)  # By the spent bins, the least sum of the sites so far.
    taken: list[np.ndarray[Any, Any]] = []
    for site, levels in search.levels.items():
        options = np.full((len(levels.counts), _BINS + 1), np.inf)
        for number, count in enumerate(levels.counts):
            bins = int(np.ceil(search.cost[site] * count / width))
            if bins <= _BINS:
                options[number, bins:] = least[: _BINS + 1 - bins] + factors[site] * levels.errors[count] ** 2
        taken.append(options.argmin(0))
        least = options.min(0)
    choice, left = {}, _BINS
    for (site, levels), numbers in zip(reversed(search.levels.items()), reversed(taken), strict=True):
        count = levels.counts[int(numbers[left])]
        choice[site] = count
        left -= int(np.ceil(search.cost[site] * count / width))
    return {site: choice[site] for site in search.levels}


def measured(model: nn.Module, task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[Site, Levels]:
    """Return the levels of each site, from one pass over the examples."""
    chosen = sites(model)
    branch_of = branches_of(model, chosen)
    sums: dict[Site, Tensor] = {}

    def add(site: Site, inputs: Tensor) -> None:
        sums[site] = sums.get(site, 0) + inputs.T @ inputs

    each_input(model, task, rows, chosen, add)
    levels = {}
    for site, hessian in sums.items():
        dampened = hessian + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
        weight = model.get_submodule(branch_of[site].output).get_parameter("weight").detach().double()
        levels[site] = Levels(site, weight, dampened)
        levels[site].remove_all()
    return levels
