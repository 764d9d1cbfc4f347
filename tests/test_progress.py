"""The argument `progress` of the library's long calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from cases import CASES, Case, random_scores

import secateur
from secateur import InputError
from secateur.data import builtin
from secateur.measuring.synthetic import synthetic_batches
from secateur.support.progress import counted
from secateur.tasks import Evaluation

Calls = list[tuple[str, Any]]


def long_calls(case: Case) -> Calls:
    """Every long call of the library on a small model, by name, as a function of `progress`."""
    model, task, rows = case.model(), case.task, case.examples
    scores = random_scores("t5-gated")
    pruned = secateur.prune(model, secateur.plan(scores, keep=0.5))
    batches = synthetic_batches(model, [1, 2], [4])
    plans = secateur.alternatives(scores, flops=0.5)
    shape: dict[str, Any] = {"batch_size": 1, "length": 4, "pairs": 3, "cache": False}
    return [
        ("attribute", lambda p: secateur.attribute(model, task, rows, max_tokens=30, progress=p)),
        ("attribute_in_rounds", lambda p: secateur.attribute_in_rounds(model, task, rows, 1, {"keep": 0.5}, progress=p)),
        ("layer_scores", lambda p: secateur.layer_scores(model, task, rows, max_tokens=30, progress=p)),
        ("choose", lambda p: secateur.choose(model, task, plans, rows, progress=p)),
        ("recover_", lambda p: secateur.recover_(model, pruned, task, rows, progress=p)),
        ("sweep", lambda p: secateur.sweep(model, task, scores, rows, [0.7, 0.4], batches[0], progress=p)),
        ("benchmark", lambda p: secateur.benchmark(model, pruned, batches, pairs=3, progress=p)),
        ("evaluate", lambda p: secateur.evaluate(model, task, rows, max_tokens=30, progress=p)),
        ("predict", lambda p: secateur.predict(model, task, rows, max_tokens=30, progress=p)),
        ("latency_table", lambda p: secateur.latency_table(model, widths=[1, 0.5], progress=p, **shape)),
    ]


NAMES = [name for name, _ in long_calls(CASES["t5-gated"])]


@pytest.mark.parametrize("name", NAMES)
def test_a_callback_counts_from_none_to_all(name: str) -> None:
    told: list[tuple[int, int]] = []
    dict(long_calls(CASES["t5-gated"]))[name](lambda done, total: told.append((done, total)))
    total = told[0][1]
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert total > 0
    assert told == sorted(set(told))


@pytest.mark.parametrize("name", ["attribute", "recover_", "benchmark", "evaluate"])
def test_true_shows_the_bar_of_tqdm(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    call = dict(long_calls(CASES["t5-gated"]))[name]
    for silent in (None, False):
        call(silent)
        assert capsys.readouterr().err == ""
    call(True)
    shown = capsys.readouterr()
    word = {"attribute": "scoring examples", "recover_": "recovering", "benchmark": "timing", "evaluate": "evaluating"}[name]
    assert f"{word}: " in shown.err
    assert "100%" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("wrong", ["yes", 1.0, [print]])
@pytest.mark.parametrize("name", NAMES)
def test_another_value_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises(InputError, match="progress: expected True, False or a function"):
        dict(long_calls(CASES["t5-gated"]))[name](wrong)


def test_compress_refuses_another_value_before_it_loads_the_model() -> None:
    with pytest.raises(InputError, match="progress: expected True, False or a function"):
        secateur.compress("./none", builtin.examples("movie")[:2], keep=0.5, progress="yes")  # type: ignore[arg-type]


def test_a_step_counts_when_it_is_done() -> None:
    told: list[int] = []
    steps = counted(lambda done, total: told.append(done), "steps", ["a", "bc"], 3, len)
    assert [(step, told.copy()) for step in steps] == [("a", [0]), ("bc", [0, 1])]
    assert told == [0, 1, 3]


@pytest.mark.parametrize("name", ["t5-gated", "bert-sequence", "bert-token", "llama", "vit"])
@pytest.mark.parametrize("open_targets", [False, True])
def test_an_evaluation_tells_of_every_batch(name: str, open_targets: bool) -> None:
    case = CASES[name]
    task = copy.copy(case.task)
    if open_targets and not task.labels_from_model:
        task.labels = None  # Generated texts (T5), perplexity (Llama).
    told: list[tuple[int, int]] = []
    secateur.evaluate(case.model(), task, case.examples, max_tokens=1, progress=lambda *counts: told.append(counts))
    count = len(case.examples)
    assert told == [(done, count) for done in range(count + 1)]


def test_a_task_that_makes_no_batches_counts_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["bert-sequence"]
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(type(case.task), "evaluate", lambda *_: Evaluation("mine", 1.0, 0.0, 1.0, 1))
    secateur.evaluate(case.model(), case.task, case.examples, progress=lambda *counts: told.append(counts))
    assert told == [(0, len(case.examples)), (len(case.examples), len(case.examples))]
