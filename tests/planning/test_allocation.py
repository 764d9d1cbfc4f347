"""Allocation: the knapsack compared with every choice, growing budgets, floors, empty sites, memory and predicted latency."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, random_scores

import secateur
from secateur import InputError, LatencyTable, Scores, Site
from secateur.planning.allocation import Ladder, greedy

CASE_NAMES = ["t5-gated", "bert-sequence", "llama"]


def random_ffn_scores(seed: int, units: Sequence[int] = (3, 4, 5)) -> Scores:
    """Return random scores of sites with random costs. The sites are all layers of a model."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(len(units), generator=generator).mul(9).add(1).tolist()
    sites = tuple(
        Site(f"encoder.{k}.ffn", "ffn", "encoder", k, "neuron", count, 1, cost, 2 * cost, 0.0, 0.0)
        for k, (count, cost) in enumerate(zip(units, costs, strict=True))
    )
    scores = {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in sites}
    return Scores(scores, sites, sites, "0" * 16, {}, 1, {"encoder": 3.0, "decoder": 3.0}, 1000)


def attribution(scores: Scores, plan: secateur.Plan) -> float:
    """Return the sum of the scores of the kept units."""
    return sum(float(scores[name][kept].sum()) for name, kept in plan.items())


def best(scores: Scores, limit: float) -> float:
    """Return the largest attribution within a share of the parameters. Try every choice."""
    total = sum(site.parameters * site.units for site in scores.sites)
    prefix = {site.name: [0.0, *scores[site.name].sort(descending=True).values.cumsum(0).tolist()] for site in scores.sites}
    largest = 0.0
    for counts in itertools.product(*(range(site.units + 1) for site in scores.sites)):
        cost = sum(site.parameters * count for site, count in zip(scores.sites, counts, strict=True))
        if cost <= limit * total * (1 + 1e-12):
            largest = max(largest, sum(prefix[site.name][count] for site, count in zip(scores.sites, counts, strict=True)))
    return largest


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [0.15, 0.5, 0.8])
def test_knapsack_is_within_its_stated_gap_of_the_best(seed: int, limit: float) -> None:
    scores = random_ffn_scores(seed)
    plan = secateur.plan(scores, params=limit, allocation="knapsack")
    gap = plan.budget_json()["gap"]
    assert 0 <= gap < 0.5
    assert attribution(scores, plan) >= (1 - gap) * best(scores, limit) - 1e-12
    assert plan.budget_json()["remaining"]["params"] <= limit + 1e-12


def test_the_gap_is_small_where_sites_have_many_units() -> None:
    plan = secateur.plan(random_ffn_scores(0, units=(500, 700, 900)), params=0.5, allocation="knapsack")
    assert plan.budget_json()["gap"] < 1e-3


@pytest.mark.parametrize("budget", [{"keep": 0.5}, {"params": 0.5}, {"params": 0.5, "allocation": "global"}])
def test_the_gap_is_zero_where_it_is_not_known(budget: Any) -> None:
    plan = secateur.plan(random_ffn_scores(3), **budget)
    assert plan.budget_json()["gap"] == 0


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
def test_a_knapsack_keeps_at_least_the_attribution_of_the_other_allocations(name: str, seed: int) -> None:
    scores = random_scores(name, seed=seed)
    kept = {
        allocation: attribution(scores, secateur.plan(scores, allocation=allocation, flops=0.5, floor=0.1))
        for allocation in ("uniform", "global", "knapsack")
    }
    assert kept["knapsack"] >= max(kept.values()) - 1e-9


def test_global_ranking_keeps_the_highest_of_all_sites() -> None:
    scores = random_ffn_scores(1)
    plan = secateur.plan(scores, params=0.5, allocation="global")
    kept = torch.cat([scores[name][units] for name, units in plan.items()])
    removed = torch.cat(
        [values[[k for k in range(len(values)) if k not in plan[name].tolist()]] for name, values in scores.items()]
    )
    assert kept.min() > removed.max()


def two_sites() -> Scores:
    """Return scores of two sites with two units. A unit of the first site costs ten times a unit of the second."""
    sites = tuple(
        Site(f"encoder.{k}.ffn", "ffn", "encoder", k, "neuron", 2, 1, price, 2 * price, 0.0, 0.0)
        for k, price in enumerate((10.0, 1.0))
    )
    values = {"encoder.0.ffn": [5.0, 3.0], "encoder.1.ffn": [4.0, 2.0]}
    by_site = {name: torch.tensor(row, dtype=torch.float64) for name, row in values.items()}
    return Scores(by_site, sites, sites, "0" * 16, {}, 1, {"encoder": 3.0, "decoder": 3.0}, 1000)


@pytest.mark.parametrize(
    ("allocation", "kept"), [("global", [1, 1]), ("knapsack", [1, 2])], ids=["global-stops", "knapsack-goes-on"]
)
def test_a_step_that_does_not_fit_ends_a_global_ranking(allocation: Any, kept: list[int]) -> None:
    """After 5 and 4 the third best unit does not fit. The fourth would: global ranking must not take it, a knapsack must."""
    plan = secateur.plan(two_sites(), params=12.5 / 22, allocation=allocation)
    assert [len(units) for units in plan.values()] == kept


def test_steps_of_several_units_are_ranked_by_their_gain_for_each_unit() -> None:
    """Widths are multiples of 4. The second step of the first site gains 4 a unit, and steps of the other gain 3 a unit."""
    scores = random_ffn_scores(1, units=(8, 8))
    scores = replace(scores, by_site=dict(zip(scores, torch.tensor([[5.0] * 4 + [4.0] * 4, [3.0] * 8]).double(), strict=True)))
    price, other_price = (site.parameters for site in scores.sites)
    plan = secateur.plan(scores, params=price / (price + other_price) + 1e-9, allocation="global", align=4)
    assert [len(units) for units in plan.values()] == [8, 0]


@pytest.mark.parametrize("allocation", ["global", "knapsack"])
@pytest.mark.parametrize(("floor", "least"), [(0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)])
def test_a_floor_rounds_up_to_whole_units(floor: float, least: int, allocation: Any) -> None:
    scores = random_ffn_scores(6, units=(4, 8))
    worthless, other = scores
    scores.by_site[worthless].neg_()
    plan = secateur.plan(scores, params=1.0, allocation=allocation, floor=floor)
    assert [len(plan[worthless]), len(plan[other])] == [least, 8]


@pytest.mark.parametrize("floor", [0.5, 1.0])
def test_a_floor_equal_to_the_budget_is_met(floor: float) -> None:
    scores = two_sites()
    plan = secateur.plan(scores, params=floor, floor=floor)
    assert [len(units) for units in plan.values()] == [2 * floor] * 2


@pytest.mark.parametrize("allocation", ["global", "knapsack"])
def test_every_site_keeps_its_floor_and_without_a_floor_a_site_may_be_empty(allocation: Any) -> None:
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


def test_a_knapsack_keeps_no_unit_with_a_negative_score() -> None:
    scores = random_ffn_scores(2)
    scores.by_site["encoder.0.ffn"].neg_()
    plan = secateur.plan(scores, params=1.0, allocation="knapsack")
    assert [len(plan[name]) for name in scores] == [0, 4, 5]


def test_the_hull_leaves_out_rungs_that_gain_too_little() -> None:
    """Costs have a step, as the widths of a matrix product have: two units cost hardly more than one."""
    (site,) = random_ffn_scores(0, units=(3,)).sites
    ladder = Ladder(site, [0, 1, 2, 3], [0.0, 0.5, 0.55, 1.0], [0.0, 1.0, 1.8, 2.0])
    assert ladder.hull() == [0, 2, 3]
    assert greedy([ladder], 0.55, by_price=True) == ([2], 0.0)
    rungs, gap = greedy([ladder], 0.5, by_price=True)
    assert rungs == [0]
    assert gap == 1.0  # The plan keeps nothing, but the relaxation keeps most of a step.


@pytest.mark.parametrize("allocation", ["uniform", "global", "knapsack"])
@pytest.mark.parametrize("name", ["bert-sequence", "llama", "t5-gated"])
def test_a_memory_budget_is_the_share_of_all_weights(name: str, allocation: Any) -> None:
    model, scores = CASES[name].model(), random_scores(name)
    assert scores.weights == secateur.cost.parameters(model)
    plan = secateur.plan(scores, memory=0.8, allocation=allocation)
    pruned = secateur.cost.parameters(secateur.prune(model, plan)) / scores.weights
    # T5's position bias has an entry per head, which no unit counts.
    bias = 0.003 if name == "t5-gated" else 1e-9
    step = max(site.parameters for site in scores.sites) / scores.weights
    assert 0.8 - step - bias < pruned <= 0.8 + bias


@pytest.mark.parametrize("allocation", ["uniform", "global", "knapsack"])
def test_a_memory_budget_counts_the_weights_outside_the_layers(allocation: Any) -> None:
    """The layers hold a quarter of all weights, so to remove a tenth of all weights is to remove four tenths of the layers."""
    scores = random_ffn_scores(5, units=(200, 300, 400))
    whole = sum(site.parameters * site.units for site in scores.sites)
    scores = replace(scores, weights=round(4 * whole))
    plan = secateur.plan(scores, memory=0.9, allocation=allocation)
    left = sum(site.parameters * len(plan[site.name]) for site in scores.sites)
    assert left / whole == pytest.approx(0.6, abs=0.005)
    with pytest.raises(InputError, match=r"^memory: expected at least 0\.75\d\d, .* got 0.7$"):
        secateur.plan(scores, memory=0.7)


def table_of(scores: Scores, rest: float = 5.0) -> LatencyTable:
    """Return a table: a unit of the k-th site (counted from one) takes k milliseconds, and everything else takes `rest`."""
    rows = {site.name: {count: (k + 1.0) * count for count in (1, site.units) if count} for k, site in enumerate(scores.sites)}
    total = rest + sum((k + 1) * site.units for k, site in enumerate(scores.sites))
    return LatencyTable({}, scores.fingerprint, "head", 1, 8, 8, total, rows, {}, {0.01: rest, 1.0: rest})


@pytest.mark.parametrize("allocation", ["uniform", "global", "knapsack"])
def test_a_plan_meets_the_predicted_latency_to_within_a_step(allocation: Any) -> None:
    scores = random_ffn_scores(4, units=(20, 30, 40))
    table = table_of(scores)
    plan = secateur.plan(scores, speedup=2.0, table=table, allocation=allocation)
    predicted = table.milliseconds({name: len(kept) for name, kept in plan.items()})
    assert table.total / 2 - 3 <= predicted <= table.total / 2 + 1e-9
    same = secateur.plan(scores, latency=table.total / 2, table=table, allocation=allocation)
    assert all(torch.equal(plan[name], same[name]) for name in plan)


@pytest.mark.parametrize("allocation", ["uniform", "global", "knapsack"])
def test_the_dense_time_as_the_limit_keeps_every_unit(allocation: Any) -> None:
    scores = random_ffn_scores(4, units=(20, 30, 40))
    table = table_of(scores)
    plan = secateur.plan(scores, latency=table.total, table=table, allocation=allocation)
    assert {name: len(kept) for name, kept in plan.items()} == {site.name: site.units for site in scores.sites}


def test_an_unreachable_speedup_and_a_table_of_another_model_are_refused() -> None:
    scores = random_ffn_scores(4)
    table = table_of(scores)
    highest = table.total / (5.0 + 1 + 2 + 3)
    with pytest.raises(InputError, match=f"^speedup: expected at most {highest:.2f}, predicted of .*, got 99$"):
        secateur.plan(scores, speedup=99, table=table)
    with pytest.raises(InputError, match=r"^table: expected one of the scored model and sites \(0{16}\), got another"):
        secateur.plan(scores, speedup=2, table=replace(table, fingerprint="1" * 16))
