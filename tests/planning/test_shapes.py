"""Shapes of plans: what stays alike, that the budget is met, that nothing better fits, and what a stock config says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import ALL, CASES, Case, scores_of

import secateur
from secateur.model import cost
from secateur.model.blocks import blocks
from secateur.model.families import family_of
from secateur.planning.budget import Budget
from secateur.planning.latency_table import LatencyTable
from secateur.planning.plan import Plan, plans_alike


def widths(plan: Plan, stack: str = "", *, heads: bool) -> set[int]:
    return {len(plan[site.name]) for site in plan.sites if site.is_head is heads and site.stack.startswith(stack)}


def flops(scores: secateur.Scores, counts: dict[str, int]) -> float:
    return cost.remaining(scores.all_sites, scores.sites, counts, "flops", scores.tokens)


@pytest.mark.parametrize("allocation", ["uniform", "knapsack"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_per_layer_attention_is_whole_or_absent(case: Case, allocation: Any) -> None:
    scores = scores_of(case.name)
    plan = secateur.plan(scores, flops=0.75, shape="per-layer", allocation=allocation)
    assert plan.spread is not None
    assert plan.spread.remaining["flops"] <= 0.75 + 1e-9
    for site in plan.sites:
        if site.is_head:
            assert len(plan[site.name]) in (0, site.units)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_stock_plan_gives_a_stock_model(case: Case) -> None:
    """The config says the whole shape, so the folder needs no code; the layers have one width and one number of heads."""
    scores = scores_of(case.name)
    plan = secateur.plan(scores, flops=0.8, shape="stock")
    assert plan.spread is not None
    assert plan.spread.shape == "stock"
    assert plan.spread.remaining["flops"] <= 0.8 + 1e-9
    for stack in {site.stack for site in plan.sites}:  # The config of BART says the sizes of each stack.
        assert len(widths(plan, stack, heads=False)) == len(widths(plan, stack, heads=True)) == 1
    model = case.model()
    pruned: Any = secateur.prune(model, plan)
    assert not hasattr(pruned.config, "secateur"), pruned.config.secateur
    assert cost.parameters(pruned) < cost.parameters(model)
    if family_of(model).heads_in_stock == "whole":
        assert all(len(plan[site.name]) == site.units for site in plan.sites if site.is_head)
    rebuilt = type(pruned)(pruned.config)
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {n: p.shape for n, p in pruned.named_parameters()}


def test_uniform_keeps_fewer_heads_where_stock_cannot() -> None:
    scores = scores_of("bert-sequence")
    plan = secateur.plan(scores, flops=0.5, shape="uniform")
    assert widths(plan, heads=True) != {4}
    with pytest.raises(
        secateur.InputError, match=r"^flops: expected at least 0\.6111, the smallest stock model with all blocks, got 0\.5$"
    ):
        secateur.plan(scores, flops=0.5, shape="stock")


@pytest.mark.parametrize("gone", [(), ("decoder.1",)])
@pytest.mark.parametrize("amount", [0.3, 0.55, 0.8, 1.0])
def test_no_model_with_alike_layers_keeps_more(amount: float, gone: tuple[str, ...]) -> None:
    """All numbers of heads and widths of a small model, tried one by one."""
    scores = scores_of("llama")
    absent = {site.name for site in scores.sites if site.block in gone}
    best: dict[int, float] = {}
    heads, width = (max(site.units for site in scores.sites if site.is_head is is_head) for is_head in (True, False))
    for h, w in itertools.product(range(1, heads + 1), range(1, width + 1)):
        counts = {s.name: 0 if s.name in absent else h if s.is_head else w for s in scores.sites}
        if flops(scores, counts) <= amount + 1e-12:
            kept = sum(float(scores[name].sort(descending=True).values[:count].sum()) for name, count in counts.items())
            best[h] = max(best.get(h, 0.0), kept)
    if not best:
        with pytest.raises(secateur.InputError, match=r"^flops: expected at least"):
            plans_alike(scores, Budget.of(flops=amount), removed_blocks=gone)
        return
    plans = plans_alike(scores, Budget.of(flops=amount), removed_blocks=gone)
    kept_by_plan = [sum(float(scores[name][plan[name]].sum()) for name in plan) for plan in plans]
    assert kept_by_plan == pytest.approx(sorted(best.values(), reverse=True))
    assert all(not len(plan[name]) for plan in plans for name in absent)


@pytest.mark.parametrize("name", ["bert-sequence", "t5-gated", "llama-mqa", "opt"])
def test_memory_counts_a_removed_block_as_nothing(name: str) -> None:
    """Norms and biases go with the block, so the plan's model is as large as the budget allows, to within a neuron a layer."""
    case, scores = CASES[name], scores_of(name)
    model, block = case.model(), scores.sites[0].block
    plan = plans_alike(scores, Budget.of(memory=0.8), removed_blocks=[block])[0]
    wide = {site.name: min(len(plan[site.name]) + (not site.is_head), site.units) for site in plan.sites if site.block != block}
    wider = replace(plan, kept={**plan.kept, **{name: torch.arange(count) for name, count in wide.items()}})
    sizes = [cost.parameters(secateur.prune(model, other)) for other in (plan, wider)]
    limit = 0.8 * cost.parameters(model)
    assert sizes[0] <= limit < sizes[1] or sizes[0] == sizes[1] < limit
    older = plans_alike(replace(scores, blocks={}), Budget.of(memory=0.8), removed_blocks=[block])[0]
    assert cost.parameters(secateur.prune(model, older)) <= sizes[0]  # Scores of an earlier version do not tell the norms.


def test_t5_keeps_the_heads_that_matter_most_in_all_layers_of_a_stack() -> None:
    scores = scores_of("t5-gated")
    plan = secateur.plan(scores, flops=0.6, shape="stock")
    for stack in ("encoder", "decoder"):
        names = [s.name for s in plan.sites if s.stack == stack and s.kind == "self_attention"]
        total = torch.stack([scores[name] for name in names]).sum(0)
        count = len(plan[names[0]])
        expected = total.argsort(descending=True, stable=True)[:count].sort().values
        assert 0 < count < len(total)
        assert all(torch.equal(plan[name], expected) for name in names)


def test_align_keep_and_time() -> None:
    scores = scores_of("llama")
    assert widths(secateur.plan(scores, flops=0.6, shape="uniform", align=8), heads=False) <= {8, 16, 24, 32}
    kept = secateur.plan(scores, keep=0.5, shape="stock")
    assert (widths(kept, heads=True), widths(kept, heads=False)) == ({2}, {19})
    rows = {site.name: {units: 0.5 + units * 0.01 for units in range(1, site.units + 1)} for site in scores.sites}
    total = 5.0 + sum(max(row.values()) for row in rows.values())
    table = LatencyTable({}, scores.fingerprint, "head", 1, 8, 8, total, rows, {}, {0.01: 5.0, 1.0: 5.0})
    fast = secateur.plan(scores, latency=total - 0.4, table=table, shape="stock")
    assert total - 0.43 <= table.milliseconds({name: len(kept) for name, kept in fast.items()}) <= total - 0.4 + 1e-9
    with pytest.raises(
        secateur.InputError, match=r"^latency: expected at least 7\.\d+, the smallest stock model with all blocks, got 5\.1$"
    ):
        secateur.plan(scores, latency=5.1, table=table, shape="stock")


def test_a_plan_file_keeps_the_shape(tmp_path: Any) -> None:
    plan = secateur.plan(scores_of("llama"), flops=0.6, shape="uniform")
    plan.save(tmp_path / "plan.json")
    assert secateur.Plan.load(tmp_path / "plan.json") == plan
    assert "shape uniform" in plan.summary()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"shape": "round"}, "shape: expected one of any, per-layer, uniform, stock, got 'round'"),
    "allocation": (
        {"shape": "stock", "allocation": "knapsack"},
        "allocation: expected uniform with shape stock, whose layers are alike, got 'knapsack'",
    ),
    "keep": (
        {"shape": "stock", "keep": 0.5, "flops": None},
        "keep: expected another budget, as all heads of encoder.0.self_attention stay in this shape, got 0.5",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_are_refused(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(secateur.InputError) as raised:
        secateur.plan(scores_of("bert-sequence"), **{"flops": 0.8, **options})
    assert str(raised.value) == message


def test_channels_are_refused() -> None:
    with pytest.raises(secateur.InputError, match=r"^shape: expected any with channels of heads"):
        secateur.plan(scores_of("llama", "channel"), flops=0.8, shape="per-layer")


def test_blocks_are_named_by_stack_and_layer() -> None:
    """`gone` names sites, and the flow finds them by the names of blocks."""
    model = CASES["t5-gated"].model()
    of_sites = {site.block for site in secateur.sites(model)}
    assert of_sites == set(blocks(model))
