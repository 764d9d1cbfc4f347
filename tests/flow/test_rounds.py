"""attribute_in_rounds: a later round scores the model that the earlier rounds have pruned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, Case

import secateur
from secateur import InputError
from secateur.flow import rounds

ONE_PER_TASK = [CASES[name] for name in ("t5-gated", "bert-sequence", "bert-token", "llama")]


@pytest.mark.parametrize("case", ONE_PER_TASK, ids=str)
def test_one_round_equals_attribute(case: Case) -> None:
    model = case.model()
    scores = secateur.attribute_in_rounds(model, case.task, case.examples, 1, {"flops": 0.5})
    assert scores.equal(secateur.attribute(model, case.task, case.examples))


@pytest.mark.parametrize("case", ONE_PER_TASK, ids=str)
def test_a_later_round_scores_the_pruned_model(case: Case) -> None:
    model = case.model()
    first = secateur.plan(secateur.attribute(model, case.task, case.examples), keep=0.25**0.5)
    scores = secateur.attribute_in_rounds(model, case.task, case.examples, 2, {"keep": 0.25})
    left = secateur.attribute(secateur.prune(model, first), case.task, case.examples)
    for site, kept in first.items():
        torch.testing.assert_close(scores[site][kept], left[site], rtol=1e-3, atol=1e-6)
        removed = sorted(set(range(len(scores[site]))) - set(kept.tolist()))
        assert removed
        assert scores[site][removed].max() < scores[site][kept].min()
    last = secateur.plan(scores, keep=0.25)
    assert all(set(kept.tolist()) <= set(first[site].tolist()) for site, kept in last.items())


@pytest.mark.parametrize("allocation", ["uniform", "global", "knapsack"])
def test_units_that_a_round_removes_do_not_return(allocation: Any) -> None:
    """Signed scores may be negative. A removed unit must rank below them, though its own score would be zero."""
    case = CASES["t5-gated"]
    model, signed = case.model(), secateur.GradientActivation(over_examples="signed")
    options: dict[str, Any] = {"allocation": allocation, "floor": 0.2}
    first = secateur.plan(
        secateur.attribute(model, case.task, case.examples, criterion=signed), flops=0.5 ** (1 / 3), **options
    )
    scores = secateur.attribute_in_rounds(
        model, case.task, case.examples, 3, {"flops": 0.5}, planning=options, criterion=signed
    )
    plan = secateur.plan(scores, flops=0.5, **options)
    removed = {site.name: set(range(site.units)) - set(first[site.name].tolist()) for site in plan.sites}
    assert sum(len(units) for units in removed.values()) > 5
    for site, kept in plan.items():
        assert not removed[site] & set(kept.tolist())
        lowest = min(0.0, float(scores[site][kept].min()))
        assert all(float(scores[site][unit]) < lowest for unit in removed[site])


def test_removed_units_score_below_zero_where_all_scores_are_high(monkeypatch: pytest.MonkeyPatch) -> None:
    """A knapsack takes every unit with a positive score that it can pay for. So a removed unit needs a negative one."""

    def raised(*arguments: Any, **options: Any) -> secateur.Scores:
        scores = secateur.attribute(*arguments, **options)
        return replace(scores, by_site={site: values + 5 for site, values in scores.items()})

    monkeypatch.setattr(rounds, "attribute", raised)
    case = CASES["t5-gated"]
    model = case.model()
    first = secateur.plan(raised(model, case.task, case.examples), keep=0.5)
    scores = secateur.attribute_in_rounds(model, case.task, case.examples, 2, {"keep": 0.25})
    for site, kept in first.items():
        gone = sorted(set(range(len(scores[site]))) - set(kept.tolist()))
        assert gone
        assert scores[site][gone].max() < 0
        assert scores[site][kept].min() >= 5


def test_rounds_plan_by_default_with_a_knapsack_that_leaves_every_site_a_unit() -> None:
    case = CASES["t5-gated"]
    model = case.model()

    def scores(**options: Any) -> secateur.Scores:
        return secateur.attribute_in_rounds(model, case.task, case.examples, 2, {"flops": 0.1}, **options)

    default = scores()
    assert default.equal(scores(planning={"allocation": "knapsack", "floor": 1e-6}))
    assert default.equal(scores(planning={"allocation": "knapsack"}))
    assert not default.equal(scores(planning={"allocation": "uniform"}))
    assert not default.equal(scores(planning={"allocation": "global"}))
    assert not default.equal(scores(planning={"floor": 0.0}))


def test_bad_input_is_refused() -> None:
    case = CASES["t5-gated"]
    with pytest.raises(InputError, match=r"^rounds: expected one at least, got 0"):
        secateur.attribute_in_rounds(case.model(), case.task, case.examples, 0, {"flops": 0.5})
    with pytest.raises(InputError, match=r"^budget: expected exactly one of "):
        secateur.attribute_in_rounds(case.model(), case.task, case.examples, 2, {})
    with pytest.raises(InputError, match=r"^checkpoint: expected none for rounds"):
        secateur.attribute_in_rounds(case.model(), case.task, case.examples, 2, {"flops": 0.5}, checkpoint="c")
