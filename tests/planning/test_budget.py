"""Budget: its keywords, the range of its amount, its allocations, its share per round, and milliseconds."""

from __future__ import annotations

from typing import Any

import pytest

import secateur
from secateur import Budget

KINDS = ("keep", "flops", "params", "memory", "speedup", "latency")
OUT_OF_RANGE = {kind: (0.0, -0.1, 1.001, float("nan"), "half") for kind in ("keep", "flops", "params", "memory")} | {
    "speedup": (0.99, float("inf"), float("nan"), "half"),
    "latency": (0.0, -1.0, float("inf"), float("nan"), "half"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_built_from_its_keyword(kind: Any) -> None:
    amounts: dict[str, float | None] = dict.fromkeys(KINDS)
    assert Budget.of(**{**amounts, kind: 1.0}) == Budget(kind, 1.0)
    options = {"align": 8, kind: 1.0}
    assert Budget.taken_from(options) == Budget(kind, 1.0)
    assert options == {"align": 8}
    assert Budget(kind, 1.0).measured == (kind in ("speedup", "latency"))


@pytest.mark.parametrize(("kind", "amount"), [(kind, amount) for kind, amounts in OUT_OF_RANGE.items() for amount in amounts])
def test_an_amount_out_of_range_is_refused(kind: Any, amount: Any) -> None:
    with pytest.raises(secateur.InputError, match=rf"^{kind}: expected a .*number.*, got "):
        Budget(kind, amount)


def test_exactly_one_budget_must_be_given() -> None:
    expected = "^budget: expected exactly one of keep, flops, params, memory, speedup, latency, got "
    with pytest.raises(secateur.InputError, match=f"{expected}none$"):
        Budget.of(keep=None)
    with pytest.raises(secateur.InputError, match=f"{expected}keep, flops$"):
        Budget.of(keep=0.5, flops=0.5)
    with pytest.raises(secateur.InputError, match=r"^budget: expected one of keep, .*, got 'size'$"):
        Budget.of(size=0.5)


def test_an_allocation_floor_or_align_that_does_not_fit_is_refused() -> None:
    Budget("keep", 0.5).check_spread("uniform", 0.1, 8)
    Budget("flops", 0.5).check_spread("knapsack", 1.0, 1)
    for budget, options, expected in [
        (Budget("keep", 0.5), ("global", 0.0, 1), "allocation: expected uniform with keep"),
        (Budget("flops", 0.5), ("greedy", 0.0, 1), "allocation: expected one of uniform, global, knapsack, got 'greedy'"),
        (Budget("flops", 0.5), ("uniform", 1.1, 1), r"floor: expected a number in \[0, 1\], got 1.1"),
        (Budget("flops", 0.5), ("uniform", 0.0, 0), "align: expected a positive number, got 0"),
    ]:
        with pytest.raises(secateur.InputError, match=f"^{expected}"):
            budget.check_spread(*options)


def test_every_round_reduces_the_amount_by_the_same_factor() -> None:
    amounts = [Budget("flops", 0.125).after(number, 3).amount for number in (1, 2, 3)]
    assert amounts == pytest.approx([0.5, 0.25, 0.125])


def test_a_speedup_and_a_latency_in_milliseconds() -> None:
    assert Budget("speedup", 2.0).milliseconds(30.0) == 15.0
    assert Budget("latency", 7.0).milliseconds(30.0) == 7.0
