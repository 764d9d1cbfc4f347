"""Results print short, notebooks show one small table, and arguments of a wrong type end in one line or are accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, scores_of
from torch import nn

import secateur
from secateur import InputError
from secateur.planning.latency_table import LatencyTable

CASE = CASES["bert-sequence"]
BATCH = {"input_ids": torch.ones(2, 4, dtype=torch.long)}


@pytest.fixture(scope="module")
def compressed() -> Any:
    return secateur.compress(
        CASE.model(), CASE.examples, CASE.task, keep=0.5, align=1, recoveries=[None], evaluation=CASE.examples,
        batch_sizes=[1], lengths=[8],
    )  # fmt: skip


def table(plan: secateur.Plan) -> LatencyTable:
    times = {site.name: {site.units: 1.0} for site in plan.sites}
    return LatencyTable({"device": "CPU"}, plan.fingerprint, "head", 2, 8, 8, 10.0, times, {}, {1.0: 2.0})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scores", ["Scores(GradientActivation: ", "examples)"]),
        ("plan", ["Plan(50.0% of the units of every site; ", " of "]),
        ("evaluation", ["Evaluation(accuracy ", "examples)"]),
        ("report", ["Report(1 x 8: ", "parameters)"]),
        ("timing", ["Timing(1 x 8: ", "ms dense)"]),
        ("comparison", ["Comparison(accuracy ", " -> ", "x at 1 x 8)"]),
        ("compressed", ["Compressed(accuracy ", "x at 1 x 8)"]),
        ("sites", ["Sites(encoder self attention: ", " neurons in "]),
        ("site", ["Site('encoder.0.self_attention', ", " heads)"]),
        ("table", ["LatencyTable(10 ms at 2 x 8, ", "CPU)"]),
        ("dry_run", ["DryRun(parameters: ", " -> "]),
    ],
)
def test_reprs_are_one_short_line(compressed: Any, name: str, expected: list[str]) -> None:
    value = result(compressed, name)
    assert all(part in repr(value) for part in expected), repr(value)
    assert len(repr(value)) < 320
    assert "\n" not in repr(value)
    assert "tensor(" not in repr(value)
    if name not in ("timing", "site"):
        html = value._repr_html_()
        assert html.startswith("<table>")
        assert html.count("<table>") == html.count("</table>") == 1
        assert html.count("<tr>") <= 26


def result(compressed: Any, name: str) -> Any:
    """Return a result by its name."""
    comparison, plan = compressed.comparison, compressed.plan
    if name == "dry_run":
        return secateur.dry_run(meta(CASE), length=8, keep=0.5)
    results: dict[str, Any] = {
        "scores": scores_of(CASE.name), "plan": plan, "evaluation": comparison.evaluation["dense"],
        "report": comparison.benchmark, "timing": comparison.benchmark.timings[0], "comparison": comparison,
        "compressed": compressed, "sites": secateur.sites(CASE.model()), "site": plan.sites[0], "table": table(plan),
    }  # fmt: skip
    return results[name]


def test_html_escapes_texts_and_cuts_long_tables() -> None:
    sites = [secateur.Site(f"<b>{n}", "ffn", "encoder", 0, "neuron", 8, 1, 1.0, 1.0, 0.0, 0.0) for n in range(30)]
    fingerprint = "0" * 16
    html = secateur.Plan({site.name: torch.arange(4) for site in sites}, tuple(sites), fingerprint)._repr_html_()
    assert "&lt;b&gt;0" in html
    assert "<b>" not in html
    assert "... 6 more" in html


Call = Callable[[Any], object]


def calls_with_a_model() -> dict[str, Call]:
    """Return calls of the public functions that take a loaded model, as functions of the model."""
    model, task, rows, scores = CASE.model(), CASE.task, CASE.examples, scores_of(CASE.name)
    plan = secateur.plan(scores, keep=0.5)
    return {
        "attribute": lambda wrong: secateur.attribute(wrong, task, rows),
        "attribute_in_rounds": lambda wrong: secateur.attribute_in_rounds(wrong, task, rows, 1, {"keep": 0.5}),
        "layer_scores": lambda wrong: secateur.layer_scores(wrong, task, rows),
        "sites": secateur.sites,
        "prune": lambda wrong: secateur.prune(wrong, plan),
        "prune_": lambda wrong: secateur.prune_(wrong, plan),
        "masked": lambda wrong: secateur.masked(wrong, plan).__enter__(),
        "verify": lambda wrong: secateur.verify(wrong, model, plan, task, []),
        "verify pruned": lambda wrong: secateur.verify(model, wrong, plan, task, []),
        "verify_layers": lambda wrong: secateur.verify_layers(wrong, model, ["encoder.0"], task, []),
        "recover_": lambda wrong: secateur.recover_(wrong, model, task, rows),
        "recover_ pruned": lambda wrong: secateur.recover_(model, wrong, task, rows),
        "evaluate": lambda wrong: secateur.evaluate(wrong, task, rows),
        "benchmark": lambda wrong: secateur.benchmark(wrong, model, [BATCH]),
        "benchmark pruned": lambda wrong: secateur.benchmark(model, wrong, [BATCH]),
        "save": lambda wrong: secateur.save(wrong, "never"),
        "latency_table": secateur.latency_table,
        "synthetic_batches": lambda wrong: secateur.synthetic_batches(wrong, [1], [2]),
        "meet_latency": lambda wrong: secateur.meet_latency(wrong, lambda asked: plan, table(plan), speedup=2.0),
        "choose": lambda wrong: secateur.choose(wrong, task, [plan], rows),
        "sweep": lambda wrong: secateur.sweep(wrong, task, scores, rows, [0.5], BATCH),
        "dry_run": lambda wrong: secateur.dry_run(wrong, keep=0.5),
        "delete_layers": lambda wrong: secateur.delete_layers(wrong, ["encoder.0"]),
        "factorise": lambda wrong: secateur.factorise(wrong, 0.5),
        "TaskPlans": lambda wrong: secateur.TaskPlans(wrong, {"a": plan}),
    }


@pytest.mark.parametrize("name", list(calls_with_a_model()))
def test_a_folder_in_place_of_a_model_ends_in_the_line_that_loads_it(name: str) -> None:
    with pytest.raises(InputError, match=r"^(task 'a': )?model: expected a loaded model, got 'folder'; .*load\('folder'\)"):
        calls_with_a_model()[name]("folder")
    with pytest.raises(InputError, match=r"^(task 'a': )?model: expected a loaded model, got Plan\("):
        calls_with_a_model()[name](secateur.plan(scores_of(CASE.name), keep=0.5))


@pytest.mark.parametrize(
    "name", ["attribute", "attribute_in_rounds", "layer_scores", "evaluate", "choose", "recover_", "sweep"]
)
def test_a_name_in_place_of_a_task_is_named(name: str) -> None:
    model, rows, scores = CASE.model(), CASE.examples, scores_of(CASE.name)
    plan, task = secateur.plan(scores, keep=0.5), "sequence-classification"
    calls: dict[str, Callable[[Any], object]] = {
        "attribute": lambda wrong: secateur.attribute(model, wrong, rows),
        "attribute_in_rounds": lambda wrong: secateur.attribute_in_rounds(model, wrong, rows, 1, {"keep": 0.5}),
        "layer_scores": lambda wrong: secateur.layer_scores(model, wrong, rows),
        "evaluate": lambda wrong: secateur.evaluate(model, wrong, rows),
        "choose": lambda wrong: secateur.choose(model, wrong, [plan], rows),
        "recover_": lambda wrong: secateur.recover_(model, secateur.prune(model, plan), wrong, rows),
        "sweep": lambda wrong: secateur.sweep(model, wrong, scores, rows, [0.5], BATCH),
    }
    with pytest.raises(InputError, match=r"^task: expected a Task, .* got 'sequence-classification'$"):
        calls[name](task)


def test_scores_in_place_of_a_plan_ask_for_plan_first() -> None:
    wrong: Any = scores_of(CASE.name)
    with pytest.raises(InputError, match=r"^plan: expected .*, got Scores\(.*\); secateur.plan\(scores, keep=0.6\) makes one"):
        secateur.prune(CASE.model(), wrong)


@pytest.mark.parametrize("call", ["plan", "alternatives", "compress", "dry_run", "attribute_in_rounds"])
def test_a_text_in_place_of_a_share_is_named(call: str) -> None:
    share: Any = "0.6"
    calls: dict[str, Callable[[], object]] = {
        "plan": lambda: secateur.plan(scores_of(CASE.name), keep=share),
        "alternatives": lambda: secateur.alternatives(scores_of(CASE.name), keep=share),
        "compress": lambda: secateur.compress(CASE.model(), CASE.examples, CASE.task, keep=share),
        "dry_run": lambda: secateur.dry_run(meta(CASE), keep=share),
        "attribute_in_rounds": lambda: secateur.attribute_in_rounds(CASE.model(), CASE.task, CASE.examples, 1, {"keep": share}),
    }
    with pytest.raises(InputError, match=r"^keep: expected a number in \(0, 1\], got '0.6'$"):
        calls[call]()


def meta(case: Case) -> nn.Module:
    """Return the model of a case without weights."""
    model = case.model()
    with torch.device("meta"):
        built: nn.Module = type(model)(model.config)
        return built


def test_paths_of_plans_scores_and_tables_are_read(tmp_path: Path) -> None:
    model, task, rows, scores = CASE.model(), CASE.task, CASE.examples, scores_of(CASE.name)
    plan = secateur.plan(scores, keep=0.5)
    plan_file, scores_file, table_file = (tmp_path / name for name in ("plan.json", "scores.safetensors", "table.json"))
    plan.save(plan_file)
    scores.save(scores_file)
    table(plan).save(table_file)
    expected = secateur.prune(model, plan).state_dict()
    for pruned in (secateur.prune(model, str(plan_file)), secateur.prune_(CASE.model(), plan_file)):
        assert all(torch.equal(value, expected[name]) for name, value in pruned.state_dict().items())
    with secateur.masked(model, plan_file):
        pass
    batches = list(task.batches(task.items(model, rows), torch.device("cpu"), 512))
    assert secateur.verify(model, secateur.prune(model, plan), plan_file, task, batches).holds
    assert secateur.TaskPlans(model, {"a": plan_file}).sizes == secateur.TaskPlans(model, {"a": plan}).sizes
    assert secateur.choose(model, task, [plan_file], rows, recoveries=[None])[0].plan == plan
    assert secateur.plan(str(scores_file), keep=0.5) == plan
    assert secateur.alternatives(scores_file, keep=0.5) == [plan]
    assert secateur.dry_run(meta(CASE), length=8, keep=0.5, scores=scores_file).plan == plan
    assert secateur.dry_run(meta(CASE), length=8, given=plan_file).plan == plan
    fast = secateur.plan(scores_file, speedup=1.0, table=table_file)
    assert fast == secateur.plan(scores, speedup=1.0, table=table(plan))
