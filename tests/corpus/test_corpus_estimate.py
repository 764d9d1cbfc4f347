"""`secateur score --estimate`: hours and cost follow from the sample, models take turns, and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import corpora
import pytest
from cases import CASES
from command import Run, assert_refused

import secateur
from secateur.corpus import estimate
from secateur.corpus.estimate import ROUNDS
from secateur.corpus.pipeline import Runner
from secateur.corpus.run import RunOptions
from secateur.corpus.shards import Reading
from secateur.corpus.sources import Row, find_sources
from secateur.support.errors import InputError

CASE = CASES["bert-sequence"]
LINE = "score m --data corpus/* --threads 1 --max-tokens 512 --dtype float32 --compile off --engine-runtime torch"


@pytest.fixture
def models(run: Run, tmp_path: Path) -> Run:
    """`run`, in a folder with the models "m" and "dense", and a corpus of two shards with 1,500 documents each."""
    model = CASE.model()
    secateur.save(model, "dense", tokenizer=CASE.task.reader)
    scores = secateur.attribute(model, CASE.task, CASE.examples)
    secateur.save(secateur.prune(model, secateur.plan(scores, keep=0.5)), "m", tokenizer=CASE.task.reader)
    Path("corpus").mkdir()
    for name in "ab":
        corpora.lines(Path("corpus"), [*corpora.texts(1499, seed=ord(name)), ""], f"{name}.txt")
    return run


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_hours_and_cost_follow_and_nothing_is_written(models: Run, tmp_path: Path) -> None:
    before = files(tmp_path)
    result = models(f"{LINE} --estimate --beside dense --price-per-hour 2.5 --json")
    assert result.code == 0, result.errors
    document = result.document
    assert files(tmp_path) == before
    assert document["documents"] == pytest.approx(3000, rel=0.05)  # By the share of the bytes.
    assert 64 <= document["sampled"] <= 3000
    assert [of["model"] for of in document["models"]] == ["m", "dense"]
    assert document["speedup"] > 0
    for of in document["models"]:
        assert of["documents_per_second"] > 0
        hours = document["documents"] / of["documents_per_second"] / 3600
        assert of["hours"] == pytest.approx(hours, rel=0.01)
        assert of["cost"] == pytest.approx(2.5 * of["hours"])
        assert (of["settings"]["runtime"], of["settings"]["max_tokens"]) == ("torch", 512)
    table = models(f"{LINE} --estimate --limit 700 --out unused")
    assert table.out.splitlines()[-1].endswith("of about 700 documents; nothing was written")
    assert files(tmp_path) == before


def test_models_take_turns_and_medians_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpora.lines(tmp_path, corpora.texts(300))
    runners = [Runner(CASE.model(), CASE.task, 1) for _ in range(2)]
    known = {id(runners[0].model): [50.0, 40.0, 90.0, 60.0, 20.0], id(runners[1].model): [25.0, 10.0, 30.0, 20.0, 40.0]}
    asked: list[tuple[int, int]] = []

    def speed(runner: Runner, rows: Sequence[Row], reading: Reading) -> float:
        asked.append((id(runner.model), len(rows)))
        timed = [model for model, count in asked if model == id(runner.model)][2:]  # The first two are not used.
        return known[id(runner.model)][len(timed) - 1] if timed else 20.0

    monkeypatch.setattr(estimate, "documents_a_second", speed)
    options, said = RunOptions(max_tokens=64, threads=1), list[str]()
    sources = find_sources(f"{tmp_path}/a.txt")
    (first, second), sampled = estimate.estimate(runners, sources, Reading(), options, said.append)
    assert [model for model, _ in asked] == [id(runner.model) for runner in runners] * (2 + ROUNDS)
    assert {count for _, count in asked[4:]} == {sampled} == {80}  # Four seconds of the slower model.
    assert (first.documents_per_second, second.documents_per_second) == (50.0, 25.0)
    assert first.slower == [1.0, 3.0]  # Of 2, 4, 3, 3 and a half.
    assert first.documents == pytest.approx(300, rel=0.01)
    assert first.hours == pytest.approx(300 / 50 / 3600, rel=0.01)


def test_the_size_may_be_unknown(tmp_path: Path) -> None:
    corpora.lines(tmp_path, corpora.texts(100))
    source = replace(find_sources(f"{tmp_path}/a.txt")[0], size=0)
    runner = Runner(CASE.model(), CASE.task, 1)
    (only,), _ = estimate.estimate([runner], [source], Reading(), RunOptions(max_tokens=64, threads=1), print)
    assert only.documents is None
    assert only.hours is None
    assert only.documents_per_second > 0


def test_a_corpus_without_documents(tmp_path: Path) -> None:
    corpora.lines(tmp_path, ["", ""])
    runner, options = Runner(CASE.model(), CASE.task, 1), RunOptions(max_tokens=64, threads=1)
    with pytest.raises(InputError, match="data: expected documents that can be scored, got none among the first"):
        estimate.estimate([runner], find_sources(f"{tmp_path}/a.txt"), Reading(), options, print)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--estimate --price-per-hour -1", "price-per-hour: expected a number of at least 0, got -1.0"),
        ("--estimate --price-per-hour nan", "price-per-hour: expected a number of at least 0, got nan"),
        ("--out scored --price-per-hour 1", "price-per-hour: expected none without --estimate, got 1.0"),
        ("--out scored --beside dense", "beside: expected none without --estimate, got 'dense'"),
        ("--estimate --engine ray", "engine: expected local with --estimate"),
        ("--estimate --resume", "resume: expected none with --estimate"),
        ("", "out: expected a folder, or --estimate, which writes nothing, got none"),
    ],
)
def test_refusals(run: Run, options: str, message: str) -> None:
    Path("corpus").mkdir()
    assert_refused(run(f"{LINE} {options}"), message, "scored")


def test_another_model_that_is_none(models: Run) -> None:
    result: Any = models(f"{LINE} --estimate --beside nowhere")
    assert result.code == 2
    assert result.errors[-1].startswith("secateur: model: ")
