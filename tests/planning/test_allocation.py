"""Allocation: the knapsack against every choice, monotone budgets, floors, empty sites, memory and predicted latency."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, scores_of

import secateur
from secateur import InputError, LatencyTable, Scores, Site
from secateur.planning.allocation import Ladder, greedy

CASE_NAMES = ["t5-gated", "bert-sequence", "llama"]


def drawn(seed: int, units: Sequence[int] = (3, 4, 5)) -> Scores:
    """Sites of random cost with random scores, all of a model's layers."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(len(units), generator=generator).mul(9).add(1).tolist()
    sites = tuple(
        Site(f"encoder.{k}.ffn", "ffn", "encoder", k, "neuron", count, 1, cost, 2 * cost, 0.0, 0.0)
        for k, (count, cost) in enumerate(zip(units, costs, strict=True))
    )
    scores = {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in sites}
    return Scores(scores, sites, sites, "0" * 16, {}, 1, {"encoder": 3.0, "decoder": 3.0}, 1000)


def random_scores(name: str, unit: Any = "head", seed: int = 0) -> Scores:
    whole, generator = scores_of(name, unit), torch.Generator().manual_seed(seed)
    return replace(whole, by_site={s.name: torch.rand(s.units, generator=generator, dtype=torch.float64) for s in whole.sites})


def attribution(scores: Scores, plan: secateur.Plan) -> float:
    return sum(float(scores[name][kept].sum()) for name, kept in plan.items())


def best(scores: Scores, limit: float) -> float:
    """The most attribution within a share of the parameters, by trying every choice."""
    total = sum(site.parameters * site.units for site in scores.sites)
    prefix = {site.name: [0.0, *scores[site.name].sort(descending=True).values.cumsum(0).tolist()] for site in scores.sites}
    found = 0.0
    for counts in itertools.product(*(range(site.units + 1) for site in scores.sites)):
        cost = sum(site.parameters * count for site, count in zip(scores.sites, counts, strict=True))
        if cost <= limit * total * (1 + 1e-12):
            found = max(found, sum(prefix[site.name][count] for site, count in zip(scores.sites, counts, strict=True)))
    return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [0.15, 0.5, 0.8])
def test_knapsack_is_within_its_stated_gap_of_the_best(seed: int, limit: float) -> None:
    scores = drawn(seed)
    plan = secateur.plan(scores, params=limit, allocation="knapsack")
    gap = plan.summary()["gap"]
    assert 0 <= gap < 0.5
    assert attribution(scores, plan) >= (1 - gap) * best(scores, limit) - 1e-12
    assert plan.summary()["remaining"]["params"] <= limit + 1e-12


def test_the_gap_closes_where_units_are_many() -> None:
    plan = secateur.plan(drawn(0, units=(500, 700, 900)), params=0.5, allocation="knapsack")
    assert plan.summary()["gap"] < 1e-3


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize("unit", ["head", "channel"])
@pytest.mark.parametrize("allocation", ["global", "knapsack"])
def test_a_larger_budget_keeps_no_less_attribution(name: str, unit: Any, allocation: Any) -> None:
    scores = random_scores(name, unit)
    kept = [
        attribution(scores, secateur.plan(scores, flops=share, allocation=allocation, per_head=unit == "channel"))
        for share in (0.45, 0.5, 0.52, 0.6, 0.61, 0.8, 0.99, 1.0)
    ]
    assert kept == sorted(kept)
    assert math.isclose(kept[-1], sum(float(values.sum()) for values in scores.values()))


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_knapsack_keeps_more_attribution_than_the_others(name: str, seed: int) -> None:
    scores = random_scores(name, seed=seed)
    kept = {
        how: attribution(scores, secateur.plan(scores, allocation=how, flops=0.5, floor=0.1))
        for how in ("uniform", "global", "knapsack")
    }
    assert kept["knapsack"] >= max(kept.values()) - 1e-9


def test_global_ranking_keeps_the_highest_of_all_sites() -> None:
    scores = drawn(1)
    plan = secateur.plan(scores, params=0.5, allocation="global")
    kept = torch.cat([scores[name][units] for name, units in plan.items()])
    gone = torch.cat(
        [values[[k for k in range(len(values)) if k not in plan[name].tolist()]] for name, values in scores.items()]
    )
    assert kept.min() > gone.max()


@pytest.mark.parametrize("allocation", ["global", "knapsack"])
def test_floors_hold_and_without_one_a_site_may_go(allocation: Any) -> None:
    scores = random_scores("t5-gated")
    worthless = "decoder.0.ffn"
    scores.by_site[worthless].zero_().sub_(1e-9)
    empty = secateur.plan(scores, flops=0.5, allocation=allocation)
    assert len(empty[worthless]) == 0
    floored = secateur.plan(scores, flops=0.5, allocation=allocation, floor=0.3)
    assert len(floored[worthless]) == math.ceil(0.3 * len(scores[worthless]))
    assert all(len(kept) >= 0.3 * len(scores[name]) for name, kept in floored.items())
    uniform = secateur.plan(scores, flops=0.5)
    assert min(len(kept) for kept in uniform.values()) >= 1


def test_negative_scores_are_not_bought() -> None:
    scores = drawn(2)
    scores.by_site["encoder.0.ffn"].neg_()
    plan = secateur.plan(scores, params=1.0, allocation="knapsack")
    assert [len(plan[name]) for name in scores] == [0, 4, 5]


def test_the_hull_passes_over_rungs_that_gain_too_little() -> None:
    """A step in cost, as widths of a matrix product have: two units cost hardly more than one."""
    (site,) = drawn(0, units=(3,)).sites
    ladder = Ladder(site, [0, 1, 2, 3], [0.0, 0.5, 0.55, 1.0], [0.0, 1.0, 1.8, 2.0])
    assert ladder.hull() == [0, 2, 3]
    assert greedy([ladder], 0.55, by_price=True) == ([2], 0.0)
    rungs, gap = greedy([ladder], 0.5, by_price=True)
    assert rungs == [0]
    assert gap == 1.0  # It keeps nothing, where the relaxation keeps most of a step.


def test_memory_is_the_share_of_all_weights() -> None:
    case = CASES["t5-gated"]
    model, scores = case.model(), scores_of("t5-gated")
    assert scores.weights == secateur.cost.parameters(model)
    plan = secateur.plan(scores, memory=0.8)
    pruned = secateur.prune(model, plan)
    # T5's position bias has an entry a head, which no unit counts.
    assert secateur.cost.parameters(pruned) / scores.weights == pytest.approx(0.8, abs=0.02)


def table_of(scores: Scores, rest: float = 5.0) -> LatencyTable:
    """A table in which each unit of a site takes a millisecond more than one of the site before, and all else `rest`."""
    rows = {site.name: {count: (k + 1.0) * count for count in (1, site.units) if count} for k, site in enumerate(scores.sites)}
    total = rest + sum((k + 1) * site.units for k, site in enumerate(scores.sites))
    return LatencyTable({}, scores.fingerprint, "head", 1, 8, 8, total, rows, {}, {0.01: rest, 1.0: rest})


@pytest.mark.parametrize("allocation", ["uniform", "global", "knapsack"])
def test_predicted_latency_is_met_to_within_a_step(allocation: Any) -> None:
    scores = drawn(4, units=(20, 30, 40))
    table = table_of(scores)
    plan = secateur.plan(scores, speedup=2.0, table=table, allocation=allocation)
    predicted = table.milliseconds({name: len(kept) for name, kept in plan.items()})
    assert table.total / 2 - 3 <= predicted <= table.total / 2 + 1e-9
    same = secateur.plan(scores, latency=table.total / 2, table=table, allocation=allocation)
    assert all(torch.equal(plan[name], same[name]) for name in plan)


def test_an_unreachable_speedup_and_a_table_of_another_model() -> None:
    scores = drawn(4)
    table = table_of(scores)
    highest = table.total / (5.0 + 1 + 2 + 3)
    with pytest.raises(InputError, match=f"^speedup: expected at most {highest:.2f}, predicted of .*, got 99$"):
        secateur.plan(scores, speedup=99, table=table)
    with pytest.raises(InputError, match=r"^table: expected one of the scored model and sites \(0{16}\), got another"):
        secateur.plan(scores, speedup=2, table=replace(table, fingerprint="1" * 16))
