"""Allocation: how many units each site keeps under a budget, the same share everywhere or more where they are worth more."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from secateur.attribution.scores import Scores
from secateur.model.sites import Site

Allocation = Literal["uniform", "global", "knapsack"]
ONE_UNIT = 1e-6  # A floor that leaves each site one unit: shares of units are rounded up.
Price = Callable[[Site, Sequence[int]], list[float]]  # What a site costs when it keeps so many units, for each number.


@dataclass(frozen=True)
class Ladder:
    """What a site may keep: `counts` of units, ascending to all of them, what each costs and how much attribution it keeps."""

    site: Site
    counts: list[int]
    prices: list[float]
    kept: list[float]

    def at(self, share: float) -> int:
        """The lowest rung that holds this share of the units, rounded up."""
        return min(bisect_left(self.counts, share * self.site.units - 1e-9), len(self.counts) - 1)

    def hull(self) -> list[int]:
        """The rungs on the concave hull of attribution over price: each step up gains less for its price than the last."""
        found: list[int] = []
        for rung in range(len(self.counts)):
            while found and (
                self.prices[rung] <= self.prices[found[-1]]
                or (len(found) > 1 and self._slope(found[-1], rung) >= self._slope(found[-2], found[-1]))
            ):
                found.pop()
            found.append(rung)
        return found

    def _slope(self, lower: int, upper: int) -> float:
        return (self.kept[upper] - self.kept[lower]) / (self.prices[upper] - self.prices[lower])


def ladders(scores: Scores, price: Price, align: int, per_head: bool, floor: float, *, may_empty: bool = False) -> list[Ladder]:
    """The rungs of every site, from the first that holds the share `floor` of its units, one step at least or, if the site may
    be emptied, none."""
    found = []
    for site in scores.sites:
        step = site.step(align, per_head)
        counts = torch.arange(1, -(-site.units // step) + 1).mul(step).clamp(max=site.units)
        counts = counts[counts.double() >= min(floor, 1.0) * site.units]
        if may_empty:
            counts = torch.cat([counts.new_zeros(1), counts])
        order = ranks(scores[site.name], site, per_head)
        best = scores[site.name].view(order.shape).gather(1, order).sum(0).cumsum(0)
        best = torch.cat([best.new_zeros(1), best])
        kept = best[counts // len(order)].tolist()
        found.append(Ladder(site, counts.tolist(), price(site, counts.tolist()), kept))
    return found


def ranks(scores: Tensor, site: Site, per_head: bool) -> Tensor:
    """The units of each head from the highest score to the lowest [heads, units of a head], where channels are ranked within
    heads; else of the site [1, units]. Ties go to the lower index."""
    return scores.view(site.ranked_groups(per_head), -1).argsort(dim=1, descending=True, stable=True)


def spread(found: Sequence[Ladder], limit: float, allocation: Allocation) -> tuple[list[int], float]:
    """The rung of each ladder, together within the limit, and how far the attribution may be from the best that is possible, as
    a share of it (0 where that is not known)."""
    if allocation == "uniform":
        return uniform(found, limit), 0.0
    return greedy(found, limit, by_price=allocation == "knapsack")


def uniform(found: Sequence[Ladder], limit: float) -> list[int]:
    """The rungs of the largest share that all sites can keep within the limit, then single rungs, site after site, while one
    fits."""

    def cost(rungs: Sequence[int]) -> float:
        return sum(ladder.prices[rung] for ladder, rung in zip(found, rungs, strict=True))

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost([ladder.at(middle) for ladder in found]) <= limit else (low, middle)
    full = [ladder.at(1.0) for ladder in found]
    rungs = full if cost(full) <= limit else [ladder.at(low) for ladder in found]
    grown = True
    while grown:
        grown = False
        for k in sorted(range(len(found)), key=lambda k: found[k].counts[rungs[k]] / found[k].site.units):
            more = [rung + (j == k) for j, rung in enumerate(rungs)]
            if rungs[k] < full[k] and cost(more) <= limit:
                rungs, grown = more, True
    return rungs


def greedy(found: Sequence[Ladder], limit: float, *, by_price: bool) -> tuple[list[int], float]:
    """The rungs that keep the most attribution within the limit, climbed in the order of what a step gains for its price, or,
    as in "global" ranking, for each of its units.

    By price each site climbs the concave hull of its rungs. The order is then that of the linear relaxation, whose optimum
    bounds every choice; returned too is how far below it the attribution is, as a share of it. A step that does not fit is
    left out with all above it, and ends a global ranking.
    """
    paths = [ladder.hull() if by_price else list(range(len(ladder.counts))) for ladder in found]
    steps = []
    for k, (ladder, path) in enumerate(zip(found, paths, strict=True)):
        for lower, upper in pairwise(path):
            gain = ladder.kept[upper] - ladder.kept[lower]
            size = ladder.prices[upper] - ladder.prices[lower] if by_price else ladder.counts[upper] - ladder.counts[lower]
            steps.append((-gain / size, k, lower, upper))
    rungs = [path[0] for path in paths]
    left = limit - sum(ladder.prices[rung] for ladder, rung in zip(found, rungs, strict=True))
    value = sum(ladder.kept[rung] for ladder, rung in zip(found, rungs, strict=True))
    bound = None
    for slope, k, lower, upper in sorted(steps):
        if slope > 0:  # Negated: from here on steps lose attribution.
            break
        if rungs[k] != lower:
            continue
        cost = found[k].prices[upper] - found[k].prices[lower]
        if cost <= left:
            rungs[k] = upper
            value, left = value + found[k].kept[upper] - found[k].kept[lower], left - cost
        elif not by_price:
            break
        elif bound is None:
            bound = value - slope * left
    return rungs, 0.0 if bound is None or bound <= 0 else (bound - value) / bound
