"""Arguments of other types, and nothing to compare, are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cases import CASES, random_scores

import secateur
from secateur import InputError

CASE = CASES["bert-sequence"]
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "attribute": lambda model, task: secateur.attribute(model, task, CASE.examples),
    "evaluate": lambda model, task: secateur.evaluate(model, task, CASE.examples),
    "layer_scores": lambda model, task: secateur.layer_scores(model, task, CASE.examples),
    "recover_": lambda model, task: secateur.recover_(model, CASE.model(), task, CASE.examples),
    "score": lambda model, task: list(secateur.corpus.score(model, task, ["the cat"])),
    "mapper": lambda model, task: secateur.corpus.mapper(model, task),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_name_of_a_model_or_a_task_is_no_model_and_no_task(name: str) -> None:
    with pytest.raises(InputError, match=r"^model: expected a loaded model"):
        CALLS[name]("bert-base-uncased", CASE.task)
    with pytest.raises(InputError, match=r"^task: expected a Task"):
        CALLS[name](CASE.model(), "sequence-classification")


def test_prune_and_plan_name_what_they_expect() -> None:
    plan = secateur.plan(random_scores(CASE.name), keep=0.5)
    with pytest.raises(InputError, match=r"^model: expected a loaded model"):
        secateur.prune("bert-base-uncased", plan)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^scores: expected secateur.Scores or the path of its file"):
        secateur.plan(plan, keep=0.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^criterion: expected a Criterion"):
        secateur.attribute(CASE.model(), CASE.task, CASE.examples, criterion=0)  # type: ignore[arg-type]


def test_nothing_to_compare_is_no_proof() -> None:
    model, plan = CASE.model(), secateur.plan(random_scores(CASE.name), keep=0.5)
    pruned, batches = secateur.prune(model, plan), iter(CASE.batches(model))
    assert secateur.verify(model, pruned, plan, CASE.task, batches).holds
    with pytest.raises(InputError, match=r"^batches: expected a batch"):
        secateur.verify(model, pruned, plan, CASE.task, batches)
    with pytest.raises(InputError, match=r"^gone: expected some of encoder.0"):
        secateur.verify_layers(model, pruned, ["encoder.9"], CASE.task, CASE.batches(model))
