"""Effort: by how many criteria `compress` scores the units, and how many plans it tries beyond theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from secateur.attribution.scores import Scores
from secateur.flow.choose import Candidate, Trials, distance
from secateur.model.sites import Site
from secateur.planning.budget import Budget
from secateur.planning.plan import Plan, plan_within
from secateur.planning.shapes import ALIKE
from secateur.support.errors import InputError
from secateur.support.fields import shown
from secateur.support.progress import Progress, reporting

Effort = Literal["low", "default", "high"]
_PARTS = 2  # Each stack is cut into halves. The branches of one kind in one half are a group.


@dataclass(frozen=True)
class Work:
    """What an effort stands for.

    With 300 examples, "low" takes 8 forward passes of the dense model over them, "default" 20 and "high" 40 at most, with the
    recovery of the chosen plan (tests/flow/test_price.py counts products of linear layers).

    Attributes:
        criteria: Names of the criteria that score the units. Each takes two passes.
        moves: The most plans that `moved` tries. Each takes about half a pass at most.
    """

    criteria: tuple[str, ...]
    moves: int


EFFORTS: dict[str, Work] = {
    "low": Work(("gradient",), 0),
    "default": Work(("gradient", "fisher", "owen:over_examples=squared"), 8),
    "high": Work(("gradient", "fisher", "owen:over_examples=squared", "owen:samples=2"), 40),
}


def work_of(effort: str) -> Work:
    """Return what an effort stands for. Raises InputError for an unknown one."""
    if effort not in EFFORTS:
        raise InputError(f"effort: expected one of {', '.join(EFFORTS)}, got {shown(effort)}")
    return EFFORTS[effort]


def moved(
    trials: Trials,
    start: Candidate,
    scores: Scores,
    budget: Budget,
    most: int,
    options: Mapping[str, Any],
    progress: Progress | None = None,
) -> list[tuple[Candidate, Scores]]:
    """Move budget between groups of sites, and keep each move that brings the predictions nearer to the dense model's.

    Scores of different sites are on different scales: a derivative cannot know what a layer is worth once the layers before it
    are pruned. So the scores of one group after another are doubled or halved, the plan is made again within the same budget,
    and the pruned and recovered model is compared with the dense one (coordinate search). It ends when no single move helps.

    Args:
        trials: Tries plans.
        start: The best candidate so far.
        scores: The scores that its plan was made from.
        budget: The budget.
        most: The most plans to try.
        options: Further arguments of `plan_within`. Nothing is tried where they settle another allocation than the knapsack, or
            where layers must be alike.
        progress: True for a progress bar, or a function of (plans tried, `most`).

    Returns:
        The candidates that were tried, each with the scaled scores that its plan was made from.
    """
    settled = options.get("allocation") not in (None, "knapsack") or options.get("shape") in ALIKE
    if most == 0 or settled or budget.kind == "keep":
        return []
    spread, floor = start.plan.spread, options.get("floor")
    floor = spread.floor if floor is None and spread is not None else floor
    options = {**options, "allocation": "knapsack", "floor": floor or 0.0}
    groups = _groups(scores.sites)
    factors = dict.fromkeys(groups.values(), 1.0)
    best, tried, known = start, list[tuple[Candidate, Scores]](), {_counts(start.plan)}
    with reporting(progress, "moving budget") as report:
        report(0, most)
        for group, factor in _moves(factors):
            changed = {**factors, group: factors[group] * factor}
            scaled = replace(scores, by_site={site: scores[site] * changed[groups[site]] for site in scores})
            plan = plan_within(scaled, budget, **options)
            if _counts(plan) in known:
                continue
            if len(tried) == most:
                break
            known.add(_counts(plan))
            candidate = trials.of(plan, start.recovery)
            tried.append((candidate, scaled))
            report(len(tried), most)
            if distance(candidate) < distance(best):
                best = candidate
                factors.update(changed)
        if len(tried) < most:
            report(most, most)
    return tried


def _groups(sites: Sequence[Site]) -> dict[str, str]:
    """Return the group of each site: its kind of branch and the half of the stack that it is in."""
    depth = {site.stack: 1 + max(other.layer for other in sites if other.stack == site.stack) for site in sites}
    return {site.name: f"{site.group} {site.layer * _PARTS // depth[site.stack]}" for site in sites}


def _moves(factors: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Yield groups with 2 and with 1/2, each group in turn, until no group has changed its factor in a whole turn."""
    before: dict[str, float] = {}
    while before != factors:
        before = dict(factors)
        for group, start in before.items():
            yield group, 2.0
            if factors[group] == start:  # The first move was not kept.
                yield group, 0.5


def _counts(plan: Plan) -> tuple[int, ...]:
    """Return how many units each site keeps. Scaling leaves the order of scores, so plans with equal numbers are equal."""
    return tuple(len(plan[site.name]) for site in plan.sites)
