"""sweep: columns that agree with each other, and budgets of one kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, scores_of

import secateur
from secateur import Budget, InputError
from secateur.flow import sweep as sweeping
from secateur.measuring.benchmark import Report
from secateur.planning.latency_table import LatencyTable

CASE = CASES["bert-sequence"]
BATCH = {"input_ids": torch.ones(2, 4, dtype=torch.long)}


@pytest.mark.parametrize("amounts", [[0.5, 0.9], [Budget("flops", 0.5), Budget("flops", 0.8)]], ids=["keep", "flops"])
def test_latency_and_speed_up_agree_while_the_machine_drifts(amounts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is twice as slow in the second run. The ratios of passes in turn tell the truth."""
    runs: list[Report] = []

    def drifting(*arguments: Any) -> Report:
        report = secateur.benchmark(*arguments, pairs=3)
        drift, speedup = (10.0, 2.0) if not runs else (20.0, 1.25)
        timing = replace(
            report.timings[0], dense_ms=drift, pruned_ms=1.1 * drift / speedup, speedup=speedup, speedup_low=speedup - 0.1,
            speedup_high=speedup + 0.1,
        )  # fmt: skip
        runs.append(replace(report, timings=[timing]))
        return runs[-1]

    monkeypatch.setattr(sweeping, "benchmark", drifting)
    points = secateur.sweep(CASE.model(), CASE.task, scores_of(CASE.name), CASE.examples, amounts, BATCH)
    dense, first, second = points
    assert [point.speedup for point in points] == [1.0, 2.0, 1.25]
    assert [point.latency_ms for point in points] == [15.0, 7.5, 12.0]
    assert [point.latency_ms * point.speedup for point in points] == pytest.approx([15.0] * 3)
    assert [point.examples_per_second * point.latency_ms for point in points] == pytest.approx([2000.0] * 3)
    assert (first.speedup_low, first.speedup_high, dense.speedup_low) == (1.9, 2.1, 1.0)
    kind = amounts[0].kind if isinstance(amounts[0], Budget) else "keep"
    assert [(point.budget, point.amount) for point in points[:2]] == [(kind, 1.0), (kind, 0.5)]
    assert ("keep" in second.to_json()) == (kind == "keep")
    assert sweeping.to_csv(points).count("\n") == 4


def test_a_sweep_over_flops_meets_each_budget() -> None:
    scores = scores_of(CASE.name)
    budgets = [Budget("flops", amount) for amount in (0.8, 0.5)]
    points = secateur.sweep(CASE.model(), CASE.task, scores, CASE.examples, budgets, BATCH, allocation="knapsack")
    for budget, point in zip(budgets, points[1:], strict=True):
        pruned = secateur.prune(CASE.model(), secateur.plan(scores, flops=budget.amount, allocation="knapsack"))
        assert point.parameters == secateur.cost.parameters(pruned)
        result = secateur.evaluate(pruned, CASE.task, CASE.examples)
        assert (point.value, point.examples) == (result.value, result.examples)


def test_a_sweep_over_speed_ups_plans_by_the_table() -> None:
    scores = scores_of(CASE.name)
    times = {s.name: {count: 1.0 * count / s.units for count in range(1, s.units + 1)} for s in scores.sites}
    total = 1.25 * len(times)
    table = LatencyTable({}, scores.fingerprint, "head", 2, 4, 8, total, times, {}, {1.0: 0.25 * len(times)})
    points = secateur.sweep(CASE.model(), CASE.task, scores, CASE.examples, [Budget("speedup", 1.5)], BATCH, table=table)
    pruned = secateur.prune(CASE.model(), secateur.plan(scores, speedup=1.5, table=table))
    assert [point.parameters for point in points[1:]] == [secateur.cost.parameters(pruned)]
    assert [point.amount for point in points] == [1.0, 1.5]


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([], "budgets: expected a list .*, got \\[\\]"),
        (0.5, "budgets: expected a list .*, got 0.5"),
        ([0.5, Budget("flops", 0.5)], "budgets: expected .* of one kind .*, got flops, keep"),
        ([Budget("latency", 5.0)], "budgets: expected .* keep, flops, params, memory, speedup, got latency"),
        ([Budget("speedup", 2.0)], "table: expected a LatencyTable"),
        ([Budget("flops", 1e-6)], "flops: expected at least"),
        (["0.5"], "keep: expected a number"),
    ],
    ids=["none", "number", "two-kinds", "latency", "no-table", "too-small", "text"],
)
def test_wrong_budgets_end_before_any_work(budgets: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "evaluate", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(InputError, match=f"^{message}"):
        secateur.sweep(CASE.model(), CASE.task, scores_of(CASE.name), CASE.examples, budgets, BATCH)
