"""compress equals its stages run one by one, writes the same files as the command, and does not change the caller's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, scores_of, uniform_plan
from command import Run, same_weights
from torch import nn
from undisturbed import assert_undisturbed, lived_in

import secateur
from secateur import InputError
from secateur.data import builtin
from secateur.flow import compress as compressing
from secateur.flow.effort import EFFORTS, Effort
from secateur.pruning.verify import Verification
from secateur.support.errors import VerificationError

ONE_PER_TASK = [CASES[name] for name in ("t5-gated", "bert-sequence", "bert-token", "llama")]
QUICK: dict[str, Any] = {"batch_sizes": [1], "lengths": [8]}
FILES = ["benchmark.png", "plan.json", "report.json", "secateur.json", "widths.png"]


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_plan(one: secateur.Plan, other: secateur.Plan) -> bool:
    return one.dumps() == other.dumps()


@pytest.mark.parametrize("case", ONE_PER_TASK, ids=str)
def test_one_call_equals_its_stages(case: Case) -> None:
    model = case.model()
    result = secateur.compress(
        model, case.examples, case.task, keep=0.5, align=1, recoveries=["least_squares"], evaluation=case.examples,
        effort="low", **QUICK,
    )  # fmt: skip
    plan = secateur.plan(secateur.attribute(model, case.task, case.examples), keep=0.5)
    pruned = secateur.prune(model, plan)
    refits = secateur.recover_(model, pruned, case.task, case.examples)
    assert same_plan(result.plan, plan)
    assert same_state(result.pruned, pruned)
    assert result.recovery == refits
    assert result.verification.holds
    evaluation = {"dense": model, "pruned": pruned}
    assert result.comparison.evaluation == {
        name: secateur.evaluate(evaluated, case.task, case.examples) for name, evaluated in evaluation.items()
    }
    assert result.comparison.parameters["pruned"] == secateur.cost.parameters(pruned)
    assert result.met is None
    assert result.task is case.task
    assert result.tokenizer is case.task.reader


def test_rounds_and_candidates_equal_those_of_the_stages() -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    result = secateur.compress(model, case.examples, case.task, flops=0.6, rounds=2, align=1, effort="low", **QUICK)
    scores = secateur.attribute_in_rounds(
        model, case.task, case.examples, 2, {"flops": 0.6}, planning={"per_head": False}
    )  # fmt: skip
    expected = secateur.choose(model, case.task, secateur.alternatives(scores, flops=0.6), case.examples)
    assert [candidate.to_json() for candidate in result.candidates] == [candidate.to_json() for candidate in expected]
    assert same_plan(result.plan, expected[0].plan)
    assert result.comparison.evaluation == {}
    summary = str(result)
    assert "picked as the closest on held-out examples" in summary
    assert "pruned equals masked" in summary
    again = secateur.compress(model, case.examples, case.task, flops=0.6, scores=scores, align=1, **QUICK)
    assert same_plan(again.plan, result.plan)
    assert same_state(again.pruned, result.pruned)


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_tries_the_plans_of_its_criteria_and_then_moves(effort: Effort) -> None:
    case = CASES["bert-sequence"]
    model = case.model()
    result = secateur.compress(model, case.examples, case.task, flops=0.6, align=1, effort=effort, **QUICK)
    plans = [
        plan
        for criterion in EFFORTS[effort].criteria
        for plan in secateur.alternatives(secateur.attribute(model, case.task, case.examples, criterion=criterion), flops=0.6)
    ]
    expected = [candidate.to_json() for candidate in secateur.choose(model, case.task, plans, case.examples)]
    found = [candidate.to_json() for candidate in result.candidates]
    assert all(candidate in found for candidate in expected)
    assert 0 < len(found) - len(expected) <= EFFORTS[effort].moves or (len(found) == len(expected) and effort == "low")
    distances = [candidate.divergence or 0.0 for candidate in result.candidates]
    assert distances == sorted(distances)
    criteria = {candidate.plan.spread.criterion for candidate in result.candidates if candidate.plan.spread is not None}
    assert criteria == set(EFFORTS[effort].criteria)
    assert f"criterion {result.plan.budget_json()['criterion']}, " in str(result)


@pytest.mark.parametrize("given", ["plan", "file"])
def test_a_given_plan_is_used(given: str, tmp_path: Path) -> None:
    case = CASES["llama"]
    model = case.model()
    plan = secateur.plan(secateur.attribute(model, case.task, case.examples), keep=0.5)
    plan.save(tmp_path / "plan.json")
    result = secateur.compress(
        model, case.examples, case.task, plan=plan if given == "plan" else tmp_path / "plan.json", recoveries=[None], **QUICK
    )
    assert same_plan(result.plan, plan)
    assert same_state(result.pruned, secateur.prune(model, plan))
    assert result.recovery == []


def test_a_latency_budget_is_met(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tolerance is so large that every measured time is close enough, because a real clock varies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = CASES["llama"]
    meetings: list[Any] = []

    def meet(*arguments: Any, **options: Any) -> Any:
        meetings.append(secateur.meet_latency(*arguments, **{**options, "tolerance": 1e9}))
        return meetings[-1]

    monkeypatch.setattr("secateur.flow.within_budget.meet_latency", meet)
    result = secateur.compress(case.model(), case.examples, case.task, latency=1000.0, recoveries=[None], **QUICK)
    assert result.met is not None
    assert result.met is meetings[0]
    assert same_plan(result.plan, meetings[0].plan)
    assert "delivered: " in str(result)


@pytest.mark.parametrize("case", ONE_PER_TASK, ids=str)
def test_the_model_is_undisturbed(case: Case, tmp_path: Path) -> None:
    model = lived_in(case)
    assert_undisturbed(
        model,
        lambda: secateur.compress(model, case.examples, case.task, flops=0.7, evaluation=case.examples, **QUICK),
    )


def test_the_model_is_undisturbed_and_nothing_is_written_when_the_verification_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = CASES["t5-gated"]
    model = case.model()
    monkeypatch.setattr(compressing, "verify", lambda *_: Verification(1.0, 0.0, 1.0, 1.0, "float32"))

    def call() -> None:
        with pytest.raises(VerificationError, match=r"^nothing was written: pruned DIFFERS FROM masked"):
            secateur.compress(model, case.examples, case.task, keep=0.7, out=tmp_path / "d", recoveries=[None], **QUICK)

    assert_undisturbed(model, call)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = CASES["bert-sequence"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(case.task.reader, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        secateur.compress(
            case.model(), case.examples, case.task, keep=0.5, recoveries=[None], out=tmp_path / "d", **QUICK
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_command_and_the_library_write_the_same_files(run: Run) -> None:
    options = "--flops 0.5 --examples 24 --batch-sizes 1 --lengths 8 --json"
    command = run(f"prune builtin --data train.jsonl --eval test.jsonl --out c {options}")
    assert command.code == 0
    messages: list[str] = []
    told: list[tuple[int, int]] = []
    result = secateur.compress(
        "builtin", "train.jsonl", flops=0.5, limit=24, evaluation="test.jsonl", out="l", say=messages.append,
        progress=lambda done, total: told.append((done, total)),
        **QUICK,
    )  # fmt: skip
    assert Path("l/plan.json").read_text() == Path("c/plan.json").read_text() == result.plan.dumps()
    assert same_weights(Path("l"), Path("c"))
    names = [sorted(path.name for path in Path(folder).iterdir()) for folder in ("l", "c")]
    assert sorted([*names[0], "run.yaml"]) == names[1]
    assert set(FILES) < set(names[0])
    document, other = json.loads(Path("l/report.json").read_text()), command.document
    assert document["evaluation"] == other["evaluation"]
    for name in ("plan", "recovery"):
        assert [candidate[name] for candidate in document["candidates"]] == [
            candidate[name] for candidate in other["candidates"]
        ]
    assert document.keys() == other.keys()
    assert Path("l/secateur.json").read_text() == Path("c/secateur.json").read_text()
    assert json.loads(json.dumps(result.to_json())) == {name: value for name, value in document.items() if name != "out"}
    assert messages[0] == "rebuilding and verifying"
    starts = [k for k, (done, _) in enumerate(told) if done == 0]
    stages = [told[first:end] for first, end in zip(starts, [*starts[1:], len(told)], strict=True)]
    # Scored examples; plans and recoveries that are tried; recovered branches, unless none recovers; the one timed shape.
    work = EFFORTS["default"]
    plans, criteria = 4 * len(work.criteria), len(work.criteria)
    assert [stage[-1][1] for stage in stages][: criteria + 2] == [24] * criteria + [plans + 2, work.moves]
    assert stages[-1] == [(0, 1), (1, 1)]
    assert all(stage[-1][0] == stage[-1][1] and stage == sorted(set(stage)) for stage in stages)
    # The model in memory keeps the dtype of the computation. The folder has the stored dtype.
    assert {parameter.dtype for parameter in result.pruned.parameters()} == {torch.float32}
    # The folder names its task, so it can be compressed again.
    again = secateur.compress("./l", "train.jsonl", keep=1.0, limit=8, recoveries=[None], **QUICK)
    assert again.task.labels == ["bad", "good"]


def test_a_user_defined_task_is_not_written_into_the_folder(tmp_path: Path) -> None:
    class Own(secateur.SequenceClassification):
        """A task class without a name on the command line."""

    case = CASES["bert-sequence"]
    task = Own(case.task.reader, labels=case.task.labels)
    result = secateur.compress(
        case.model(), case.examples, task, keep=0.5, align=1, recoveries=[None], out=tmp_path / "d", **QUICK
    )  # fmt: skip
    assert not (tmp_path / "d/secateur.json").exists()
    assert (tmp_path / "d/plan.json").read_text() == result.plan.dumps()
    assert same_state(secateur.load(tmp_path / "d"), result.pruned)


def test_unlabelled_rows_with_named_labels_equal_the_stages(run: Run) -> None:
    rows = builtin.examples("movie")[:16]
    inputs = [{"input": row["input"]} for row in rows]
    result = secateur.compress(
        "builtin", inputs, keep=0.6, unlabeled=True, labels=["good", "bad"], recoveries=[None], effort="low", **QUICK
    )  # fmt: skip
    model, tokenizer = builtin.load()
    task = secateur.TextToText(tokenizer, labels=["good", "bad"])
    criterion = secateur.GradientActivation(labels="all", over_examples="absolute")
    scores = secateur.attribute(model, task, inputs, criterion=criterion)
    assert same_plan(result.plan, secateur.plan(scores, keep=0.6, align=16))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no-budget": ({}, "budget: expected exactly one of keep, flops, params, memory, speedup, latency, got none"),
    "two-budgets": ({"keep": 0.5, "flops": 0.5}, "budget: expected exactly one of .*, got keep, flops"),
    "range": ({"keep": 1.5}, r"keep: expected a number in \(0, 1\], got 1.5"),
    "plan-and-budget": ({"keep": 0.5, "plan": "p.json"}, "plan: expected a plan or a budget, got both"),
    "no-plan-file": ({"plan": "p.json"}, "plan: no such file: 'p.json'"),
    "no-plan": ({"plan": 3}, "plan: expected secateur.Plan or the path of its file, got 3"),
    "no-task": ({"keep": 0.5, "task": None}, "task: expected a Task with a loaded model, .*, got none"),
    "task-by-name": (
        {"keep": 0.5, "task": "text-to-text"},
        "task: expected a Task with a loaded model, .*, got 'text-to-text'",
    ),
    "model": ({"keep": 0.5, "model": 3}, "model: expected a model, a folder or a Hub name, got int"),
    "no-folder": ({"keep": 0.5, "model": "./nothing", "task": None}, "model: no such model folder: './nothing'"),
    "no-such-task": (
        {"keep": 0.5, "model": "builtin", "task": "chess"},
        "task: expected one of text-to-text, .*, got 'chess'",
    ),
    "per-head": ({"keep": 0.5, "per_head": True}, "per_head: expected unit 'channel', got unit 'head'"),
    "unit": ({"keep": 0.5, "unit": "layer"}, "unit: expected head or channel, got 'layer'"),
    "criterion": ({"keep": 0.5, "criterion": "best"}, "criterion: expected one of gradient"),
    "unlabeled": (
        {"keep": 0.5, "criterion": "fpp", "unlabeled": True},
        "unlabeled: expected a criterion with the setting 'labels'",
    ),
    "allocation": ({"flops": 0.5, "allocation": "best"}, "allocation: expected one of uniform, global, knapsack, got 'best'"),
    "allocation-of-keep": ({"keep": 0.5, "allocation": "global"}, "allocation: expected uniform with keep"),
    "floor": ({"flops": 0.5, "floor": 2.0}, "floor: expected a number in"),
    "align": ({"flops": 0.5, "align": 0}, "align: expected a positive number, got 0"),
    "rounds": ({"flops": 0.5, "rounds": 0}, "rounds: expected one at least, got 0"),
    "rounds-of-latency": ({"latency": 5.0, "rounds": 2}, "rounds: expected 1 with a latency"),
    **{
        f"{name}-of-a-plan": (
            {"plan": uniform_plan(CASES["t5-gated"], "head"), name: value},
            f"{name}: expected none with a plan, where it has no effect, got ",
        )
        for name, value in {
            "criterion": "ig",
            "select": "ffn",
            "unit": "channel",
            "rounds": 2,
            "allocation": "uniform",
            "floor": 0.1,
            "align": 8,
            "per_head": True,
        }.items()
    },
    "recovery-of-biases": (
        {"keep": 0.5, "recoveries": ["bias"]},
        "method: expected least_squares for T5ForConditionalGeneration, which has no biases to fit, got 'bias'",
    ),
    "recovery-of-biases-too": ({"flops": 0.5, "recoveries": ["scale", "bias"]}, "method: expected least_squares for T5For"),
    "recovery": ({"keep": 0.5, "recoveries": ["best"]}, "recoveries: expected some of least_squares, .*, got 'best'"),
    "no-recovery": ({"keep": 0.5, "recoveries": []}, "recoveries: expected one at least"),
    "effort": ({"keep": 0.5, "effort": "most"}, "effort: expected one of low, default, high, got 'most'"),
    "effort-and-plan": (
        {"effort": "high", "plan": uniform_plan(CASES["t5-gated"], "head")},
        "effort: expected none with a plan, where it has no effect, got 'high'",
    ),
    "max-tokens": ({"keep": 0.5, "max_tokens": 0}, "max_tokens: expected a whole number of at least 1, got 0"),
    "limit": ({"keep": 0.5, "limit": 0}, "limit: expected a whole number of at least 1, got 0"),
    "batch-sizes": ({"keep": 0.5, "batch_sizes": [0]}, r"batch_sizes: expected a whole number from 1 to 65536, got 0"),
    "lengths": ({"keep": 0.5, "lengths": []}, r"lengths: expected one number at least, got none"),
    "labels": ({"keep": 0.5, "labels": "a,b"}, "task: expected the task's own labels, prompt, columns and max_length"),
    "device": ({"keep": 0.5, "device": "cpu"}, "device, dtype: expected none with a loaded model"),
    "rounds-no-number": ({"keep": 0.5, "rounds": "2"}, "rounds: expected one at least, got '2'"),
    "limit-no-whole-number": ({"keep": 0.5, "limit": 1.5}, "limit: expected a whole number of at least 1, got 1.5"),
    "max-length": ({"keep": 0.5, "max_length": 0}, "max_length: expected a whole number of at least 2, got 0"),
    "keep-true": ({"keep": True}, r"keep: expected a number in \(0, 1\], got True"),
    "allocation-empty": ({"flops": 0.5, "allocation": ""}, "allocation: expected one of uniform, global, knapsack, got ''"),
    "floor-no-number": ({"flops": 0.5, "floor": "x"}, r"floor: expected a number in \[0, 1\], got 'x'"),
    "align-no-whole-number": ({"flops": 0.5, "align": 1.5}, "align: expected a positive number, got 1.5"),
    "select": ({"keep": 0.5, "select": 5}, "select: expected words such as 'encoder.ffn', got 5"),
    "recoveries-text": (
        {"keep": 0.5, "recoveries": "scale"},
        "recoveries: expected several values, such as a list, got 'scale'",
    ),
    "recoveries-none": ({"keep": 0.5, "recoveries": None}, "recoveries: expected several values, such as a list, got None"),
    "batch-sizes-number": ({"keep": 0.5, "batch_sizes": 8}, "batch_sizes: expected several values, such as a list, got 8"),
    "batch-sizes-float": ({"keep": 0.5, "batch_sizes": [1.5]}, "batch_sizes: expected a whole number from 1 to 65536, got"),
    "scores": ({"keep": 0.5, "scores": 3}, "scores: expected secateur.Scores or the path of its file, got 3"),
    "scores-of-another-model": (
        {"keep": 0.5, "scores": scores_of("llama")},
        r"scores: expected scores of this model \(fingerprint .*\), got scores of another one \(",
    ),
    "positions": (
        {"keep": 0.5, "model": CASES["bart"].model(), "lengths": [8, 41]},
        "lengths: expected at most the model's 40 positions, got 41",
    ),
    "meta": (
        {"keep": 0.5, "model": CASES["t5-gated"].build().to("meta")},
        "model: expected weights that have values, got 'shared.weight' on the meta device: load",
    ),
    "tokenizer": ({"keep": 0.5, "tokenizer": 5, "out": "d"}, "tokenizer: expected one with save_pretrained, .*, got int"),
    "out-no-path": ({"keep": 0.5, "out": 5}, "out: expected the path of a folder, got 5"),
    "out": ({"keep": 0.5, "out": "."}, "out: expected a folder that does not exist yet, got '.', which exists"),
}


@pytest.mark.parametrize("labels", [5, [1, 2]])
def test_labels_that_are_no_texts_are_refused(labels: Any) -> None:
    with pytest.raises(InputError, match=r"^labels: expected texts, or a text with commas between the labels, got "):
        secateur.compress("builtin", "builtin:movie", keep=0.5, labels=labels, limit=4, **QUICK)


@pytest.mark.parametrize("case", ONE_PER_TASK, ids=str)
def test_held_out_examples_with_other_labels_are_refused_before_the_scoring(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressing, "attribute_in_rounds", lambda *_, **__: pytest.fail("the scoring began"))
    example, column = case.examples[0], case.task.columns[-1]
    target = ["X"] * len(example[column]) if isinstance(example[column], list) else "X"
    other = [{**example, column: target}]
    with pytest.raises(InputError, match=r"^examples, row 1.*: expected a t(arget|ag) among the (labels|model)"):
        secateur.compress(case.model(), case.examples, case.task, keep=0.5, evaluation=other, **QUICK)


def test_rounding_the_weights_of_a_half_precision_model_leaves_its_rotary_frequencies() -> None:
    case = CASES["llama"]
    model = case.model(torch.bfloat16)
    result = secateur.compress(model, case.examples, case.task, keep=0.5, align=1, recoveries=["scale"], **QUICK)
    frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    of_pruned = dict(result.pruned.named_buffers())
    assert frequencies
    assert all(torch.equal(of_pruned[name], frequency) for name, frequency in frequencies.items())
    assert {parameter.dtype for parameter in result.pruned.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", BAD)
def test_wrong_usage_is_refused_in_one_line_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in ("attribute_in_rounds", "within_budget", "choose", "prune", "read_for"):
        monkeypatch.setattr(compressing, stage, lambda *_, **__: pytest.fail("a stage began"))
    monkeypatch.setattr(secateur.Task, "read", lambda *_, **__: pytest.fail("a stage began"))
    options, message = BAD[name]
    case = CASES["t5-gated"]
    arguments = {"model": case.model(), "examples": case.examples, "task": case.task, **options}
    with pytest.raises(InputError, match=f"^{message}") as caught:
        secateur.compress(**arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
