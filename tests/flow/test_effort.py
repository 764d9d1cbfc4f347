"""Moves of budget between groups of sites: they stay within the budget, and repair scores of one group on a wrong scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cases import CASES, Case, scores_of

import secateur
from secateur.flow.choose import Candidate, Trials, distance
from secateur.flow.effort import moved
from secateur.planning.budget import Budget

BUDGET = Budget("flops", 0.5)


def trials_of(case: Case) -> Trials:
    return Trials(case.model(), case.task, case.examples, [None], unlabeled=False, max_tokens=4096)


def start_of(trials: Trials, scores: secateur.Scores, **options: Any) -> Candidate:
    return trials.of(secateur.plan(scores, flops=BUDGET.amount, allocation="knapsack", **options), None)


@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "llama"])
def test_moves_repair_a_wrong_scale(name: str) -> None:
    case = CASES[name]
    trials, right = trials_of(case), scores_of(name)
    wrong = replace(right, by_site={site: scores * (1e-3 if "ffn" in site else 1) for site, scores in right.items()})
    start = start_of(trials, wrong)
    tried = moved(trials, start, wrong, BUDGET, 30, {})
    best = min((candidate for candidate, _ in tried), key=distance)
    assert distance(best) < distance(start)
    plans = [candidate.plan for candidate, _ in tried]
    assert len({tuple(len(plan[site]) for site in plan) for plan in (start.plan, *plans)}) == len(plans) + 1
    for candidate, scaled in tried:
        assert candidate.plan == secateur.plan(scaled, flops=BUDGET.amount, allocation="knapsack")
        assert candidate.plan.spread is not None
        assert candidate.plan.spread.remaining["flops"] <= BUDGET.amount


@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_more_plans_are_tried_than_allowed(most: int) -> None:
    case = CASES["t5-gated"]
    trials, told = trials_of(case), list[tuple[int, int]]()
    tried = moved(
        trials,
        start_of(trials, scores_of("t5-gated")),
        scores_of("t5-gated"),
        BUDGET,
        most,
        {},
        lambda *done: told.append(done),
    )
    assert len(tried) == most
    assert told == ([(done, most) for done in range(most + 1)] if most else [])


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        (Budget("keep", 0.5), {}),
        (BUDGET, {"allocation": "uniform"}),
        (BUDGET, {"shape": "stock"}),
        (BUDGET, {"shape": "uniform"}),
    ],
)
def test_nothing_moves_where_the_plan_is_settled(budget: Budget, options: dict[str, Any]) -> None:
    trials = trials_of(CASES["t5-gated"])
    scores = scores_of("t5-gated")
    assert moved(trials, start_of(trials, scores), scores, budget, 5, options) == []


def test_the_floor_of_the_start_is_kept() -> None:
    trials, scores = trials_of(CASES["bert-sequence"]), scores_of("bert-sequence")
    tried = moved(trials, start_of(trials, scores, floor=0.3), scores, BUDGET, 4, {})
    assert tried
    assert all(len(candidate.plan[site.name]) >= 0.3 * site.units for candidate, _ in tried for site in scores.sites)
