"""Compiled bulk scoring: the same probabilities, the same bits in a resumed run, and when compilation is tried."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import corpora
import pytest
import torch
from cases import CASES, CLASSES, LABELS
from torch import Tensor, nn

import secateur
from secateur.corpus import pipeline
from secateur.corpus.compiling import LabelScores
from secateur.corpus.output import Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.run import SETTINGS, CorpusRun, RunOptions, alone_in, sample_of, tuning_of, with_tuning
from secateur.corpus.shards import Reading, score_shards
from secateur.corpus.sources import Row, find_sources
from secateur.corpus.tuning import Sample, tuned
from secateur.corpus.windows import windows
from secateur.tasks import Task
from secateur.tasks.batches import Batch

T5, BERT = CASES["t5-gated"], CASES["bert-sequence"]


def has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def score_into(folder: Path, name: str, runner: Runner) -> list[dict[str, Any]]:
    """Score each shard with its own runner, as resumed runs do."""
    for source in find_sources(f"{folder}/*.txt"):
        (finished,) = score_shards(replace(runner), [source], Folder(str(folder / name)), Reading(), lambda source: {})
        assert finished.error is None
    return [row for rows in corpora.read(folder / name).values() for row in rows]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Modules that torch.compile imports raise warnings.
@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_compiled_probabilities_equal_the_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    for name in "ab":
        corpora.lines(tmp_path, corpora.texts(100, ord(name)), f"{name}.txt")
    plain = Runner(T5.model(), T5.task, 40, workers=2, threads=1)
    expected = score_into(tmp_path, "plain", plain)
    hooks = [len(module._forward_hooks) for module in plain.model.modules()]
    # A batch that the kernels compiled beforehand do not take, in any thread, becomes an error.
    stance = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda wanted: stance("fail_on_recompile"))
    first = score_into(tmp_path, "first", replace(plain, compiled="default"))
    graphs = counters["stats"]["unique_graphs"]
    second = score_into(tmp_path, "second", replace(plain, compiled="default"))
    assert counters["stats"]["unique_graphs"] == graphs  # Further shards, as Ray's workers get them, compile nothing.
    assert first == second
    assert first != expected  # Other kernels round differently.
    for row, wanted in zip(first, expected, strict=True):
        for label in LABELS:
            assert row[f"p_{label}"] == pytest.approx(wanted[f"p_{label}"], rel=1e-4, abs=1e-6)
    assert [len(module._forward_hooks) for module in plain.model.modules()] == hooks
    assert score_into(tmp_path, "after", plain) == expected


def sample(of: float | None) -> Sample:
    rows = [Row(text) for text in corpora.texts(600)]
    (window,) = windows([(rows, 1.0)], BERT.task, BERT.model(), len(CLASSES), max_tokens=4096, on_long="cut")
    return Sample(window.items, corpus_tokens=of)


def choose(of: float | None, compile: bool | None) -> tuple[Runner, list[str]]:
    """What tuning chooses where only compilation is open, and the lines that it reports."""
    said: list[str] = []
    runner = Runner(BERT.model(), BERT.task, 1)
    return tuned(runner, sample(of), max_tokens=512, threads=1, compile=compile, say=said.append), said


def replace_compiler(monkeypatch: pytest.MonkeyPatch, change: float = 0.0) -> None:
    """Replaces compilation: the function remembers its scores, and adds `change` to those of the first label."""
    known: dict[tuple[int, ...], Tensor] = {}

    @contextmanager
    def compiled(task: Task, model: nn.Module, mode: str, threads: int | None) -> Iterator[LabelScores]:
        def label_scores(model: nn.Module, batch: Batch) -> Tensor:
            rows = tuple(batch.rows)
            if rows not in known:
                known[rows] = task.label_scores(model, batch) + change * torch.eye(len(CLASSES))[0]
            return known[rows]

        yield label_scores

    monkeypatch.setattr(pipeline, "compiled", compiled)


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def search() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", search)


def test_short_corpora_are_not_compiled() -> None:
    for of, why in (
        (1e3, "scoring takes about 0.0 minutes without it, and it pays from 30 minutes on"),
        (None, "the length of the corpus"),
    ):
        chosen, said = choose(of, None)
        assert chosen.compiled is None
        assert len(said) == 1
        assert said[0].startswith(f"compilation left out: {why}")


@pytest.mark.parametrize(("of", "compile"), [(1e9, None), (None, True), (1e3, True)])
def test_faster_compilation_is_taken(of: float | None, compile: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    chosen, (line,) = choose(of, compile)
    assert chosen.compiled == "default"
    assert line.startswith("compiled (default) in ")
    assert line.endswith("x as fast, taken")
    assert with_tuning(Runner(BERT.model(), BERT.task, 1), json.loads(json.dumps(tuning_of(chosen)))).compiled == "default"
    earlier = {name: value for name, value in tuning_of(chosen).items() if name != "compiled"}
    assert with_tuning(Runner(BERT.model(), BERT.task, 1), earlier).compiled is None


def test_compilation_that_changes_probabilities_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch, change=1.0)
    chosen, (line,) = choose(1e9, None)
    assert chosen.compiled is None
    assert line.startswith("default compilation left out: expected probabilities within 0.01, got a change by 0.")
    with pytest.raises(secateur.InputError, match=r"compile: expected probabilities within 0\.01, got"):
        choose(1e9, True)


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler(monkeypatch)
    chosen, (line,) = choose(1e9, None)
    assert chosen.compiled is None
    assert line == "default compilation left out: expected a C++ compiler (the environment variable CXX names one), got none"
    with pytest.raises(secateur.InputError, match=r"compile: expected a C\+\+ compiler \(.*\), got none"):
        choose(1e9, True)
    # A resumed run on a machine without a compiler.
    corpora.lines(tmp_path, corpora.texts(20))
    with pytest.raises(secateur.InputError, match=r"compile: expected a C\+\+ compiler"):
        score_into(tmp_path, "out", Runner(BERT.model(), BERT.task, 64, threads=1, compiled="default"))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_keeps_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_compiler(monkeypatch)
    corpora.lines(tmp_path, corpora.texts(30))
    sources, folder = find_sources(f"{tmp_path}/a.txt"), Folder(str(tmp_path / "out"))
    wanted = RunOptions(max_tokens=64, threads=1, compile=True)
    with alone_in(folder):
        first = CorpusRun(sources, folder, Reading(), {}, resume=False)
        # There are too few rows to measure anything but the requested compilation.
        runner = first.ready(Runner(BERT.model(), BERT.task, 1), wanted, print)
        first.begin(runner)
        list(first.score(runner))
    assert json.loads((tmp_path / "out" / SETTINGS).read_text())["tuned"]["compiled"] == "default"
    assert first.summary.to_json()["measured"][0].startswith("compiled (default) in ")
    second = CorpusRun(sources, folder, Reading(), {}, resume=True)
    assert second.ready(Runner(BERT.model(), BERT.task, 1), RunOptions(), print).compiled == "default"


@pytest.mark.parametrize(("limit", "share"), [(None, 1.0), (300, 0.1)])
def test_the_corpus_is_estimated_from_its_sample(limit: int | None, share: float, tmp_path: Path) -> None:
    for name in "abc":
        corpora.lines(tmp_path, corpora.texts(1000, ord(name)), f"{name}.txt")
    estimate = sample_of(find_sources(f"{tmp_path}/*.txt"), Reading(limit=limit), Runner(BERT.model(), BERT.task, 16))
    tokens = sum(len(ids) for name in "abc" for ids in BERT.task.encode(corpora.texts(1000, ord(name))))
    assert 2048 <= len(estimate.items) < 3000
    assert estimate.corpus_rows == pytest.approx(share * 3000, rel=0.05)
    assert estimate.corpus_tokens == pytest.approx(share * tokens, rel=0.05)
