"""choose compares plans and recoveries on examples that they are not fitted on. It does not change the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import CASES, CLASSES, WORDS, Case, scores_of

import secateur
from secateur import InputError
from secateur.flow.choose import alternatives
from secateur.measuring.divergence import divergence

ONE_PER_TASK = [CASES[name] for name in ("t5-gated", "bert-sequence", "bert-token", "llama")]


@pytest.mark.parametrize("case", ONE_PER_TASK, ids=str)
def test_the_candidate_closest_to_the_dense_model_comes_first(case: Case) -> None:
    model = case.model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scores = secateur.attribute(model, case.task, case.examples)
    everything, most, half = (secateur.plan(scores, keep=keep) for keep in (1.0, 0.8, 0.4))
    candidates = secateur.choose(model, case.task, [half, everything, most], case.examples, recoveries=[None])
    assert candidates[0].plan is everything
    assert candidates[0].divergence == pytest.approx(0.0, abs=1e-6)
    distances = [candidate.divergence for candidate in candidates]
    assert distances == sorted(distances, key=lambda distance: distance or 0.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert [
        candidate.to_json()
        for candidate in secateur.choose(model, case.task, [half, everything, most], case.examples, recoveries=[None])
    ] == [candidate.to_json() for candidate in candidates]


def test_divergence_equals_the_kullback_leibler_formula() -> None:
    case = CASES["bert-sequence"]
    model, other = case.model(), case.model(seed=1)
    batches = list(case.task.batches(case.task.items(model, case.examples), torch.device("cpu"), 64))
    expected = 0.0
    for batch in batches:
        with torch.no_grad():
            p, q = (case.task.logits(one.eval(), batch).double().softmax(-1) for one in (model, other))
        for row, column in (batch.labels != -100).nonzero().tolist():
            expected += sum(float(a * (a / b).log()) for a, b in zip(p[row, column], q[row, column], strict=True))
    assert divergence(model, other, case.task, batches) == pytest.approx(expected / len(case.examples), rel=1e-6)


def different_examples(count: int) -> list[dict[str, Any]]:
    """Return examples with different texts."""
    pairs = [f"{first} {second}" for first in WORDS for second in WORDS]
    return [{"input": text, "target": CLASSES[i % len(CLASSES)]} for i, text in enumerate(pairs[:count])]


@pytest.mark.parametrize(("count", "used", "compared"), [(2, 2, 1), (7, 7, 2), (120, 120, 24), (130, 130, 34), (310, 200, 104)])
def test_examples_of_the_comparison_differ_from_those_of_the_fit(
    count: int, used: int, compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["bert-sequence"]
    model, task, examples = case.model(), case.make_task(), different_examples(count)
    scores = secateur.attribute(model, case.task, case.examples)
    plans = [secateur.plan(scores, keep=keep) for keep in (0.8, 0.4)]
    runs: list[set[str]] = []
    items = task.items

    def recorded(model: Any, rows: Sequence[dict[str, Any]], **options: Any) -> Any:
        runs.append({row["input"] for row in rows})
        return items(model, rows, **options)

    monkeypatch.setattr(task, "items", recorded)
    secateur.choose(model, task, plans, examples, recoveries=["scale"])
    first, *others = [rows for k, rows in enumerate(runs) if rows not in runs[:k]]
    (second,) = others
    assert not first & second
    assert first | second == {example["input"] for example in examples[:used]}
    assert {len(first), len(second)} == {compared, used - compared}


def test_only_the_best_plan_is_tried_with_the_other_recoveries() -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    scores = secateur.attribute(model, case.task, case.examples)
    least, most, half = (secateur.plan(scores, keep=keep) for keep in (0.1, 0.95, 0.5))
    candidates = secateur.choose(model, case.task, [least, most, half], case.examples, recoveries=[None, "scale", "bias"])
    assert len(candidates) == 5
    plans = {method: [c.plan for c in candidates if c.recovery == method] for method in (None, "scale", "bias")}
    assert sorted(map(id, plans[None])) == sorted(map(id, (least, most, half)))
    assert [len(plans["scale"]), len(plans["bias"])] == [1, 1]
    assert plans["scale"][0] is plans["bias"][0] is most


def test_a_single_candidate_is_returned_without_a_comparison() -> None:
    case = CASES["t5-gated"]
    model = case.model()
    plan = secateur.plan(secateur.attribute(model, case.task, case.examples), keep=0.5)
    (only,) = secateur.choose(model, case.task, [plan], [], recoveries=["least_squares"])
    assert (only.plan, only.recovery, only.divergence) == (plan, "least_squares", None)


def test_alternatives_vary_only_options_that_are_not_given() -> None:
    case = CASES["t5-gated"]
    scores = secateur.attribute(case.model(), case.task, case.examples)
    spreads = [(plan.budget_json()["allocation"], plan.budget_json()["floor"]) for plan in alternatives(scores, flops=0.5)]
    assert [allocation for allocation, _ in spreads] == ["uniform", *["knapsack"] * 3]
    assert spreads[1][1] > 0.3 > 0.01 > spreads[2][1] > spreads[3][1] == 0.0
    assert [plan.budget_json()["allocation"] for plan in alternatives(scores, keep=0.5, flops=None)] == ["uniform"]
    (fixed,) = alternatives(scores, flops=0.5, allocation="global", floor=0.2)
    assert (fixed.budget_json()["allocation"], fixed.budget_json()["floor"]) == ("global", 0.2)
    assert [plan.budget_json()["floor"] for plan in alternatives(scores, flops=0.5, floor=0.1)] == [0.0, 0.1]


def test_bad_input_is_refused() -> None:
    case = CASES["t5-gated"]
    model = case.model()
    plan = secateur.plan(secateur.attribute(model, case.task, case.examples), keep=0.5)
    with pytest.raises(InputError, match=r"^plans: expected one at least, and one recovery, got 0 and 3"):
        secateur.choose(model, case.task, [], case.examples)
    with pytest.raises(InputError, match=r"^examples: expected two at least, .* got 1"):
        secateur.choose(model, case.task, [plan], case.examples[:1])
    with pytest.raises(InputError, match=r"^method: expected one of least_squares, scale, bias, got 'best'"):
        secateur.choose(model, case.task, [plan], case.examples, recoveries=["best", None])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("removable", "shape", "message"),
    [
        ("decoder.0", "stock", "removable: expected names of blocks, with shape stock alone, got 'decoder.0'"),
        (["decoder.0"], "any", "removable: expected names of blocks, with shape stock alone"),
        (["decoder.7"], "stock", "removable: expected some of decoder.0, decoder.1, got 'decoder.7'"),
    ],
)
def test_blocks_that_cannot_be_removed_are_refused(removable: Any, shape: str, message: str) -> None:
    with pytest.raises(secateur.InputError, match=f"^{re.escape(message)}"):
        secateur.alternatives(scores_of("llama"), flops=0.6, shape=shape, removable=removable)


def test_a_share_of_the_units_removes_no_block() -> None:
    plans = secateur.alternatives(scores_of("llama"), keep=0.5, shape="stock", removable=["decoder.1"])
    assert not any(plan.removed_blocks for plan in plans)
