"""Allocation: how many units each site keeps under a budget."""

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
ONE_UNIT = 1e-6  # A floor that leaves every site one unit: a share of units is rounded up.
# The cost of a site for each number of units that it may keep: (site, counts [rungs]) -> costs [rungs].
Price = Callable[[Site, Sequence[int]], list[float]]


@dataclass(frozen=True)
class Ladder:
    """The numbers of units that one site may keep. A rung is an index into the three lists.

    Attributes:
        site: The site.
        counts: Numbers of units [rungs], ascending. The last one is all units of the site.
        prices: The cost of keeping that many units [rungs].
        attribution: The sum of the scores of that many best units [rungs].
    """

    site: Site
    counts: list[int]
    prices: list[float]
    attribution: list[float]

    def at(self, share: float) -> int:
        """The lowest rung that holds this share of the site's units, rounded up."""
        return min(bisect_left(self.counts, share * self.site.units - 1e-9), len(self.counts) - 1)

    def hull(self) -> list[int]:
        """The rungs on the concave hull of attribution over price. Each step up the hull gains less for its price than the
        step before it."""
        on_hull: list[int] = []
        for rung in range(len(self.counts)):
            while on_hull and (
                self.prices[rung] <= self.prices[on_hull[-1]]
                or (len(on_hull) > 1 and self._slope(on_hull[-1], rung) >= self._slope(on_hull[-2], on_hull[-1]))
            ):
                on_hull.pop()
            on_hull.append(rung)
        return on_hull

    def _slope(self, lower: int, upper: int) -> float:
        """The attribution gained for each unit of price between two rungs."""
        return (self.attribution[upper] - self.attribution[lower]) / (self.prices[upper] - self.prices[lower])


def ladders(scores: Scores, price: Price, align: int, per_head: bool, floor: float, *, may_empty: bool = False) -> list[Ladder]:
    """Make the ladder of every scored site.

    Args:
        scores: The scores of the units.
        price: The cost of a site for each number of units that it may keep.
        align: Neurons come and go in groups of this size; see `_step` for channels.
        per_head: Whether every head of an attention keeps the same number of channels.
        floor: The lowest rung holds at least this share of the site's units, and one step at least.
        may_empty: Whether a rung without any unit comes first.

    Returns:
        One ladder for each site, in the order of `scores.sites`.
    """
    of_sites = []
    for site in scores.sites:
        step = site.step(align, per_head)
        steps = -(-site.units // step)  # Rounded up: the last step may hold fewer units.
        counts = torch.arange(1, steps + 1).mul(step).clamp(max=site.units)  # [rungs]
        counts = counts[counts.double() >= min(floor, 1.0) * site.units]
        if may_empty:
            counts = torch.cat([counts.new_zeros(1), counts])
        order = ranks(scores[site.name], site, per_head)  # [heads, units of a head], or [1, units]
        # The sum over the heads of the r-th best score of each head.
        gains = scores[site.name].view(order.shape).gather(1, order).sum(0)  # [units of a head]
        totals = torch.cat([gains.new_zeros(1), gains.cumsum(0)])  # [units of a head + 1], by units that each head keeps
        attribution = totals[counts // len(order)].tolist()  # [rungs]
        of_sites.append(Ladder(site, counts.tolist(), price(site, counts.tolist()), attribution))
    return of_sites


def ranks(scores: Tensor, site: Site, per_head: bool) -> Tensor:
    """Rank the units of a site from the highest score to the lowest. Ties go to the lower index.

    Args:
        scores: The scores of the site's units [units].
        site: The site.
        per_head: Whether channels are ranked within each head.

    Returns:
        Indices within a head [heads, units of a head] where channels are ranked within heads, else indices within the site
        [1, units].
    """
    grouped = scores.view(site.ranked_groups(per_head), -1)  # [heads, units of a head]
    return grouped.argsort(dim=1, descending=True, stable=True)


def allocate(of_sites: Sequence[Ladder], limit: float, allocation: Allocation) -> tuple[list[int], float]:
    """Choose a rung of each ladder, so that their prices together stay within the limit.

    Args:
        of_sites: The ladders [sites].
        limit: The highest sum of prices.
        allocation: "uniform", "global" or "knapsack".

    Returns:
        The rungs [sites], and the gap: how far the attribution may be from the best possible one, as a share of that one. The
        gap is 0 where it is not known.
    """
    if allocation == "uniform":
        return uniform(of_sites, limit), 0.0
    return greedy(of_sites, limit, by_price=allocation == "knapsack")


def uniform(of_sites: Sequence[Ladder], limit: float) -> list[int]:
    """Choose the rungs of the largest share that all sites can keep within the limit. Then climb single rungs, site after
    site, while one fits.

    Args:
        of_sites: The ladders [sites].
        limit: The highest sum of prices.

    Returns:
        The rungs [sites].
    """

    def cost(rungs: Sequence[int]) -> float:
        return sum(ladder.prices[rung] for ladder, rung in zip(of_sites, rungs, strict=True))

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost([ladder.at(middle) for ladder in of_sites]) <= limit else (low, middle)
    full = [ladder.at(1.0) for ladder in of_sites]  # [sites]
    rungs = full if cost(full) <= limit else [ladder.at(low) for ladder in of_sites]
    climbed = True
    while climbed:
        climbed = False
        for k in sorted(range(len(of_sites)), key=lambda k: of_sites[k].counts[rungs[k]] / of_sites[k].site.units):
            higher = [rung + (j == k) for j, rung in enumerate(rungs)]
            if rungs[k] < full[k] and cost(higher) <= limit:
                rungs, climbed = higher, True
    return rungs


def greedy(of_sites: Sequence[Ladder], limit: float, *, by_price: bool) -> tuple[list[int], float]:
    """Choose the rungs that keep the most attribution within the limit, one step after another.

    By price, each site climbs the concave hull of its rungs, and the step that gains the most for its price comes first. This
    order solves the linear relaxation, whose optimum bounds every choice. A step that does not fit is left out, and so are the
    steps above it on its ladder. Otherwise, as in "global" ranking, the step that gains the most for each of its units comes
    first, and a step that does not fit ends the climb. Steps that lose attribution are not taken.

    Args:
        of_sites: The ladders [sites].
        limit: The highest sum of prices.
        by_price: Whether gains are divided by prices rather than by numbers of units.

    Returns:
        The rungs [sites], and how far the attribution is below the bound, as a share of the bound. The share is 0 where every
        step fits, or where there is no bound.
    """
    paths = [ladder.hull() if by_price else list(range(len(ladder.counts))) for ladder in of_sites]
    steps = []  # (gain for its price or for its units, negated; site; lower rung; upper rung)
    for k, (ladder, path) in enumerate(zip(of_sites, paths, strict=True)):
        for lower, upper in pairwise(path):
            gain = ladder.attribution[upper] - ladder.attribution[lower]
            size = ladder.prices[upper] - ladder.prices[lower] if by_price else ladder.counts[upper] - ladder.counts[lower]
            steps.append((-gain / size, k, lower, upper))
    rungs = [path[0] for path in paths]  # [sites]
    left = limit - sum(ladder.prices[rung] for ladder, rung in zip(of_sites, rungs, strict=True))
    total = sum(ladder.attribution[rung] for ladder, rung in zip(of_sites, rungs, strict=True))
    bound = None
    for slope, k, lower, upper in sorted(steps):
        if slope > 0:  # Slopes are negated: from here on, steps lose attribution.
            break
        if rungs[k] != lower:  # A step below this one was left out.
            continue
        ladder = of_sites[k]
        cost = ladder.prices[upper] - ladder.prices[lower]
        if cost <= left:
            rungs[k] = upper
            total, left = total + ladder.attribution[upper] - ladder.attribution[lower], left - cost
        elif not by_price:
            break
        elif bound is None:
            bound = total - slope * left  # The relaxation takes the part of the step that fits.
    return rungs, 0.0 if bound is None or bound <= 0 else (bound - total) / bound
