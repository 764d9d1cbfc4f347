"""The report of a GPU run, rehearsed on the CPU: rows survive, the limit is kept to, and rehearsals are not shown."""

from __future__ import annotations

import gc
import json
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.measurements import gpu_kernels, gpu_models, gpu_report
from bench.measurements.gpu_report import Report, TimeUpError, about_run, run, time_limit
from bench.report import gpu
from bench.support import provenance
from bench.support.provenance import commit

from secateur import GradientActivation
from secateur_kernels.backend import INTERPRETED

pytestmark = pytest.mark.skipif(gpu_kernels.DEVICE != "cpu" or INTERPRETED, reason="rehearses on the CPU")


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """A report at its beginning."""
    return Report(tmp_path / "rehearsal.json", about_run(1.0, rehearse=True))


def written(report: Report) -> dict[str, Any]:
    """Return the content of the report's file."""
    document: dict[str, Any] = json.loads(report.path.read_text())
    return document


def broken() -> dict[str, Any]:
    raise RuntimeError("no memory")


def endless() -> dict[str, Any]:
    while True:
        time.sleep(0.01)


def test_every_step_runs_in_the_rehearsal(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tiny BERT"
    monkeypatch.setattr(gpu_models, "REHEARSED", {name: gpu_models.REHEARSED[name]})
    monkeypatch.setattr(gpu_report, "TESTS", {"none": ["tests/kernels/test_kernels_gpu.py", "--collect-only"]})
    run(report, 10.0, rehearse=True)
    result = written(report)
    assert result["finished"]
    assert result["not_measured"] == []
    assert {row["operation"] for row in result["kernels"]} == set(gpu_kernels.CASES)
    assert len(result["kernels"]) == len(result["compiled_kernels"]) == 10
    parts = ("ceilings", "kernels", "attribution", "integrated", "latency", "tests", "compiled_kernels", "compiled_latency")
    for part in parts:
        for row in result[part]:
            assert not [key for key in row if key.endswith("error") and key != "relative_error"], row
    assert result["tests"][0]["returncode"] == 0
    (row,) = result["attribution"]
    assert row["reference_over_bare"]["median"] > 0
    text = report.path.with_suffix(".md").read_text()
    assert text.startswith("A rehearsal")
    assert name in text
    assert all(f"| {operation} |" in text for operation in gpu_kernels.CASES)


def test_the_limit_is_kept_to_and_what_was_measured_stays(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "SPARE", 0.0)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # It takes long where much is loaded.
    monkeypatch.setattr(gpu_kernels, "ceilings", lambda *_: {})
    monkeypatch.setattr(gpu_kernels, "measure", lambda *_: {})
    monkeypatch.setattr(gpu_kernels, "compiled_columns", lambda *_, **__: endless())
    monkeypatch.setattr(gpu_report, "measure_models", lambda *_, **__: None)
    monkeypatch.setattr(gpu_report, "TESTS", {})
    start = time.monotonic()
    run(report, 0.2, rehearse=True)  # 12 seconds.
    assert time.monotonic() - start < 30
    result = written(report)
    assert not result["finished"]
    assert len(result["kernels"]) == 10
    assert result["not_measured"][0]["part"] == "compiled_kernels"
    assert {"part": "kernels at other shapes"} in result["not_measured"]


def test_rows_are_written_as_they_are_measured(report: Report) -> None:
    report.add("kernels", {"operation": "one"}, lambda: {"triton_ms": 1.0})
    assert written(report)["kernels"][0]["triton_ms"] == 1.0
    report.add("kernels", {"operation": "two"}, broken)
    assert written(report)["kernels"][1]["error"] == "RuntimeError: no memory"
    with pytest.raises(TimeUpError), time_limit(0.2):
        report.add("kernels", {"operation": "three"}, endless)
    assert [row["operation"] for row in written(report)["kernels"]] == ["one", "two"]
    assert report.result["not_measured"] == [{"part": "kernels", "operation": "three"}]


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: gpu_kernels.Work) -> gpu_kernels.Case:
        case = gpu_kernels.product_sum_case(work)
        case.computed = lambda: 1.1 * case.expected()
        return case

    monkeypatch.setitem(gpu_kernels.CASES, "product_sum", wrong)
    work = list(gpu_kernels.works(gpu_kernels.REHEARSED[0]))[2]
    row = gpu_kernels.measure(work, {"copy_bytes_per_second": 1.0, "product_operations_per_second": 1.0})
    assert row["error"] == "wrong result: not timed"
    assert "triton_ms" not in row


def test_a_graph_that_cannot_be_captured_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    ran: list[str] = []

    def refuse(*_: Any, **__: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu_kernels, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(testing, "do_bench", lambda *_, **__: 3.0)
    monkeypatch.setattr(testing, "do_bench_cudagraph", lambda *_, **__: 2.0)
    assert gpu_kernels.seconds(lambda: ran.append("run")) == (0.002, "graph")
    assert len(ran) == 3  # The warm-up, before anything is timed.
    assert gpu_kernels.seconds(lambda: None, captured=False) == (0.003, "events")
    monkeypatch.setattr(testing, "do_bench_cudagraph", refuse)
    assert gpu_kernels.seconds(lambda: None) == (0.003, "events")


def test_a_scorer_is_built_before_the_passes_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    original = GradientActivation.scorer

    def count(self: Any, context: Any) -> Any:
        built.append(1)
        return original(self, context)

    monkeypatch.setattr(GradientActivation, "scorer", count)
    case = gpu_models.on_device(gpu_models.REHEARSED["tiny BERT"]())
    run_once = gpu_models.scoring(case, GradientActivation(), "reference")
    assert built == [1]
    run_once()
    run_once()
    assert built == [1]


def test_the_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert commit() != ""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)  # No repository.
    assert commit() == "unknown"

    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert commit() == "unknown"


def test_pages_show_runs_and_no_rehearsals(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    report.add("attribution", {"model": "T5"}, partial(dict, bare_ms=10.0, tokens=8, triton_over_bare={"median": 1.04}))
    monkeypatch.setattr(gpu, "RESULTS", report.path.parent)
    assert gpu.gpu() == gpu.gpu_summary() == gpu.NOT_MEASURED
    assert gpu.gpu_plot() == {}
    report.result["rehearsal"] = False
    report.write()
    assert "| T5 | 8 | 10.0 | 1.040 | - |" in gpu.gpu_summary()
    assert "| T5 | 8 | 10.0 | 1.040 | - |" in gpu.gpu()
