"""OpenVINO beside torch: the same probabilities, the choice at the start, the cache of exported models, and refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import corpora
import pytest
import torch
from cases import CASES, CLASSES
from command import Run, assert_refused
from encoders import pair_tokenizer
from torch import Tensor, nn

import secateur
from secateur.corpus import openvino_runtime, pipeline, score
from secateur.corpus.openvino_runtime import cached_at, exported, takes_openvino
from secateur.corpus.output import Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.run import SETTINGS, CorpusRun, RunOptions, alone_in, tuning_of, with_tuning
from secateur.corpus.shards import Reading
from secateur.corpus.sources import Row, find_sources
from secateur.corpus.tuning import RUNTIME_GAIN, Sample, _Trial, tuned
from secateur.corpus.windows import windows
from secateur.support.errors import InputError
from secateur.tasks import Task
from secateur.tasks.batches import Batch
from secateur.tasks.logits import openvino_graph

BERT, T5 = CASES["bert-sequence"], CASES["t5-gated"]
FIXED = "--threads 1 --max-tokens 512 --dtype float32 --compile off"
HAS = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAS, reason="needs openvino: pip install 'secateur[openvino]'")
CLASSIFIERS = ["bert-sequence", "roberta", "distilbert", "modernbert", "vit"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def pretend(monkeypatch: pytest.MonkeyPatch, change: float = 0.0, times: float = 2.0) -> None:
    """Replace OpenVINO by torch, whose first logit changes, and have trials say that it is so many times as fast."""

    def scores(task: Task, model: nn.Module, workers: int, threads: int) -> Any:
        def label_scores(model: nn.Module, batch: Batch) -> Tensor:
            return task.label_scores(model, batch) + change * torch.eye(len(CLASSES))[0]

        return label_scores

    def speed(trial: _Trial, runner: Runner) -> float:
        return 1000.0 * (times if runner.runtime == "openvino" else 1.0)

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "openvino" or found(name))
    monkeypatch.setattr(pipeline, "openvino_scores", scores)
    monkeypatch.setattr(_Trial, "speed", speed)


def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))


def choose(runtime: str, corpus_tokens: float | None = 1e12) -> tuple[Runner, list[str]]:
    """What tuning chooses where only the runtime is open, and the lines that it reports."""
    said: list[str] = []
    rows = [Row(text) for text in corpora.texts(600)]
    (window,) = windows([(rows, 1.0)], BERT.task, BERT.model(), len(CLASSES), max_tokens=4096, on_long="cut")
    runner = Runner(BERT.model(), BERT.task, 1)
    sample = Sample(window.items, corpus_tokens=corpus_tokens)
    return tuned(runner, sample, max_tokens=512, threads=1, runtime=runtime, say=said.append), said


@pytest.mark.parametrize(("times", "taken"), [(RUNTIME_GAIN + 0.01, True), (RUNTIME_GAIN - 0.01, False)])
def test_a_faster_runtime_is_taken(times: float, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, times=times)
    chosen, (line,) = choose("auto")
    assert (chosen.runtime == "openvino") is taken
    assert line.startswith("openvino, probabilities within ")
    assert line.endswith(f": {times:.2f}x as fast{', taken' * taken}")
    again = with_tuning(Runner(BERT.model(), BERT.task, 1), json.loads(json.dumps(tuning_of(chosen))))
    assert again.runtime == chosen.runtime
    assert choose("torch")[1] == []
    assert choose("openvino")[0].runtime == "openvino"


def test_a_runtime_is_not_tried_where_scoring_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export takes longer than it saves there. By name it is taken all the same."""
    pretend(monkeypatch, times=2.0)  # Torch scores 1,000 tokens a second.
    assert choose("auto", 299_000)[1] == [
        "openvino left out: scoring takes about 5.0 minutes without it, and it pays from 5 minutes on"
    ]
    assert choose("auto", None)[1] == ["openvino left out: the length of the corpus is unknown"]
    assert choose("auto", 301_000)[0].runtime == "openvino"
    assert choose("openvino", 10)[0].runtime == "openvino"


def test_a_runtime_that_changes_probabilities_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, change=1.0)
    chosen, (line,) = choose("auto")
    assert chosen.runtime == "torch"
    assert line.startswith("openvino left out: expected probabilities of openvino within 0.01, got a change by 0.")
    with pytest.raises(InputError, match=r"engine-runtime: expected probabilities of openvino within 0\.01, got a change by"):
        choose("openvino")


def saved(folder: Path, case: str = "bert-sequence", texts: int = 20) -> None:
    secateur.save(CASES[case].model(), folder / "m", tokenizer=CASES[case].task.reader)
    corpora.lines(folder, corpora.texts(texts), "a.txt")


def test_a_missing_package(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto says nothing and goes on with torch. By name, and in a resumed run, one line names the extra."""
    absent(monkeypatch)
    saved(tmp_path, texts=600)
    line = "engine-runtime: openvino needs the package openvino: pip install 'secateur[openvino]'"
    assert_refused(run(f"score m --data a.txt {FIXED} --engine-runtime openvino --out scored"), line, "scored")
    result = run(f"score m --data a.txt {FIXED} --out scored --json")
    assert result.document["settings"]["runtime"] == "torch"
    assert result.document["measured"] == []
    assert "openvino" not in " ".join(result.errors)
    settings = Path("scored") / SETTINGS
    document = json.loads(settings.read_text())
    settings.write_text(json.dumps({**document, "tuned": {**document["tuned"], "runtime": "openvino"}}))
    resumed = run(f"score m --data a.txt {FIXED} --out scored --resume")
    assert (resumed.code, resumed.errors[-1]) == (2, f"secateur: {line}")
    with pytest.raises(InputError, match="engine-runtime: openvino needs the package openvino"):
        next(score(BERT.model(), BERT.task, corpora.texts(3), engine_runtime="openvino"))


def test_refusals(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    saved(tmp_path)
    line = "score m --data a.txt --threads 1 --max-tokens 512 --out scored --engine-runtime"
    assert_refused(run(f"{line} tensorrt"), "engine-runtime: expected auto, torch, openvino, got 'tensorrt'", "scored")
    assert_refused(run(f"{line} openvino --compile on"), "compile: expected off or auto with the runtime openvino", "scored")
    with pytest.raises(InputError, match="engine_runtime: expected torch or openvino, got 'auto'"):
        next(score(BERT.model(), BERT.task, ["a"], engine_runtime="auto"))
    with pytest.raises(InputError, match="expected torch for a model in float64 on cpu"):
        next(score(BERT.model().double(), BERT.task, ["a"], engine_runtime="openvino"))
    special: Any = BERT.model()
    torch.nn.utils.parametrizations.weight_norm(special.classifier)
    with pytest.raises(InputError, match="parametri"):
        next(score(special, BERT.task, ["a"], engine_runtime="openvino"))
    assert not takes_openvino(BERT.task, special)
    assert takes_openvino(BERT.task, BERT.model())


@pytest.mark.parametrize(("case", "options"), [("t5-gated", "--labels open"), ("bert-token", ""), ("llama", "--labels open")])
def test_other_tasks_are_refused_by_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, options: str
) -> None:
    pretend(monkeypatch)
    saved(tmp_path, case)
    line = f"score m --data a.txt --out scored --threads 1 --max-tokens 512 {options}"
    name = CASES[case].task.name
    assert_refused(run(f"{line} --engine-runtime openvino"), f"engine-runtime: expected torch for {name}, as", "scored")
    result = run(f"{line} --json")
    assert result.code == 0, result.errors
    assert result.document["settings"]["runtime"] == "torch"


def test_folders_of_older_versions_are_torchs(run: Run, tmp_path: Path) -> None:
    saved(tmp_path)
    line = f"score m --data a.txt {FIXED} --out scored"
    assert run(line).code == 0
    settings = Path("scored") / SETTINGS
    document = json.loads(settings.read_text())
    for runtime, code in ((None, 0), ("tensorrt", 2)):
        document["tuned"].pop("runtime", None)
        settings.write_text(json.dumps({**document, "tuned": document["tuned"] | ({"runtime": runtime} if runtime else {})}))
        assert run(f"{line} --resume").code == code


def probabilities(model: nn.Module, task: Task, inputs: list[Any], runtime: str) -> list[dict[str, Any]]:
    batches = score(model, task, inputs, engine_runtime=runtime, max_tokens=256, threads=2)
    return [row for batch in batches for row in batch.to_pylist()]


def assert_alike(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Check for the same rows, with the same values up to rounding."""
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        for name, value in row.items():
            assert other[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)


@needs_openvino
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_probabilities_are_torchs(name: str) -> None:
    case = CASES[name]
    texts: list[Any] = corpora.texts(60)
    if name == "vit":
        texts = [example["image"] for example in case.examples]
    model: Any = case.model()
    modules = {path: type(module) for path, module in model.named_modules()}
    attention = model.config._attn_implementation
    assert_alike(probabilities(model, case.task, texts, "torch"), probabilities(model, case.task, texts, "openvino"))
    assert {path: type(module) for path, module in model.named_modules()} == modules
    assert model.config._attn_implementation == attention


@needs_openvino
@pytest.mark.parametrize("name", ["t5-relu", "t5-gated", "bart"])
@pytest.mark.parametrize("at_once", [1 << 26, 1])
def test_label_trees_of_encoder_decoders(name: str, at_once: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of several pieces and a common beginning; other labels of the same depths share the graph, others do not."""
    monkeypatch.setattr("secateur.tasks.label_tree._LOGITS", at_once)  # At the smallest, rows run one by one.
    case = CASES[name]
    model, words = case.model(), corpora.texts(3)[1].split()
    for labels, graphs in (
        ([words[0], f"{words[0]} {words[1]}", words[2]], 1),
        ([words[3], f"{words[3]} {words[4]}", words[5]], 1),
        (words[:2], 2),
    ):
        task = secateur.TextToText(case.task.reader, labels=list(dict.fromkeys(labels)))
        given = probabilities(model, task, corpora.texts(40), "openvino")
        assert_alike(probabilities(model, task, corpora.texts(40), "torch"), given)
        assert len(list(cache.rglob(openvino_runtime.FILE))) == graphs


@needs_openvino
def test_pruned_models_and_pairs(tmp_path: Path) -> None:
    """Heads that differ by layer; segments that tell the texts of a pair apart, in batches beside texts."""
    from exported_tasks import task_folder

    model: Any = secateur.load(task_folder(tmp_path / "m", "bert-sequence", "any"))
    task = secateur.SequenceClassification(pair_tokenizer())
    texts = corpora.texts(40)
    inputs = [*texts, *(list(pair) for pair in zip(texts, texts[::-1], strict=True))]
    expected = probabilities(model, task, inputs, "torch")
    assert_alike(expected, probabilities(model, task, inputs, "openvino"))
    assert expected[40:] != expected[:40]


@needs_openvino
@pytest.mark.parametrize("kind", ["labels", "value"])
def test_other_outputs(kind: str) -> None:
    from cases import _encoder
    from transformers import BertConfig, BertForSequenceClassification

    names, problem = (["war", "sport"], "multi_label_classification") if kind == "labels" else (["LABEL_0"], None)
    model = _encoder(BertForSequenceClassification, BertConfig, names, problem_type=problem).eval()
    task = secateur.SequenceClassification(BERT.task.reader)
    inputs = corpora.texts(30)
    assert_alike(probabilities(model, task, inputs, "torch"), probabilities(model, task, inputs, "openvino"))


@needs_openvino
def test_the_cache_follows_the_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = BERT.model()
    first = exported(BERT.task, model)
    assert first.is_relative_to(cache / "secateur" / "openvino")
    written = first.stat().st_mtime_ns
    assert exported(BERT.task, BERT.model()) == first
    assert first.stat().st_mtime_ns == written
    with torch.no_grad():
        model.classifier.weight[1, 3] += 1.0  # One number of all weights.
    assert cached_at(BERT.task, model) != first.parent
    assert_alike(*(probabilities(model, BERT.task, corpora.texts(20), runtime) for runtime in ("torch", "openvino")))
    assert len(list(cache.rglob(openvino_runtime.FILE))) == 2
    assert cached_at(BERT.task, model.to(torch.bfloat16)) != cached_at(BERT.task, BERT.model())
    other: Any = BERT.model()
    other.config.layer_norm_eps = 0.5
    assert cached_at(BERT.task, other) != first.parent


@needs_openvino
def test_the_cache_keeps_the_models_that_were_used_last(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_runtime, "KEPT", 2)
    monkeypatch.setattr(openvino_runtime, "_export", lambda task, model, path: path.write_text("a graph"))
    model: Any = BERT.model()

    def used(layer_norm_eps: float, second: int) -> Path:
        model.config.layer_norm_eps = layer_norm_eps
        folder = exported(BERT.task, model).parent
        os.utime(folder, (second, second))
        return folder

    first, second = used(0.1, 1), used(0.2, 2)
    (first.parent / "another's").mkdir()
    assert used(0.1, 3) == first
    third = used(0.3, 4)
    assert not second.exists()
    assert {path.name for path in first.parent.iterdir()} == {first.name, third.name, "another's"}
    before = time.time()
    model.config.layer_norm_eps = 0.1
    exported(BERT.task, model)
    assert first.stat().st_mtime > before - 10  # Its use was noted.


@needs_openvino
def test_a_wrong_or_impossible_graph_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BERT.model()
    right = openvino_graph

    def wrong(model: Any, example: Any) -> Any:
        with torch.no_grad():
            model.classifier.bias += 1.0
        return right(model, example)

    def impossible(model: Any, example: Any) -> Any:
        raise RuntimeError("no such operation")

    for graph, message in ((wrong, "differ from torch's by 1"), (impossible, "cannot take .*: no such operation")):
        monkeypatch.setattr(openvino_runtime, "openvino_graph", graph)
        with pytest.raises(InputError, match=f"engine-runtime: openvino.*{message}"):
            probabilities(model, BERT.task, ["a cat"], "openvino")
        assert not list(cache.rglob("*.xml"))
        assert choose("auto")[0].runtime == "torch"
    monkeypatch.undo()
    blocked = cache / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(InputError, match=r"the exported model cannot be written to .*: Not a directory; XDG_CACHE_HOME names"):
        exported(BERT.task, model)


@needs_openvino
def test_a_resumed_run_keeps_its_runtime_and_its_bits(tmp_path: Path) -> None:
    for name in "ab":
        corpora.lines(tmp_path, corpora.texts(150, ord(name)), f"{name}.txt")

    def run(out: str, options: RunOptions, shards: int, resume: bool) -> Runner:
        folder = Folder(str(tmp_path / out))
        with alone_in(folder):
            scoring = CorpusRun(find_sources(f"{tmp_path}/*.txt"), folder, Reading(), {}, resume=resume)
            runner = scoring.ready(Runner(BERT.model(), BERT.task, 1), options, print)
            scoring.begin(runner)
            scores = scoring.score(runner)
            for _ in range(shards):
                next(scores)
            scores.close()  # type: ignore[attr-defined]
        return runner

    openvino = RunOptions(max_tokens=64, threads=2, runtime="openvino")
    run("whole", openvino, 2, False)
    run("pieces", openvino, 1, False)
    assert len(corpora.read(tmp_path / "pieces")) == 1
    assert run("pieces", replace(openvino, runtime="torch"), 1, True).runtime == "openvino"
    assert len(corpora.read(tmp_path / "pieces")) == 2
    assert corpora.read(tmp_path / "pieces") == corpora.read(tmp_path / "whole")
    run("torch", replace(openvino, runtime="torch"), 2, False)
    assert corpora.read(tmp_path / "torch") != corpora.read(tmp_path / "whole")


@needs_openvino
def test_the_whole_command(run: Run, tmp_path: Path) -> None:
    saved(tmp_path, texts=700)
    common = "score m --data a.txt --threads 1 --max-tokens 512 --compile off --dtype float32 --json"
    automatic = run(f"{common} --out auto").document
    assert [line for line in automatic["measured"] if line.startswith("openvino left out: scoring takes about 0.0 minutes")]
    result = run(f"{common} --out scored --engine-runtime openvino")
    assert result.code == 0, result.errors
    assert result.document["settings"]["runtime"] == "openvino"
    assert run(f"{common} --out plain --engine-runtime torch").document["settings"]["runtime"] == "torch"
    ((*rows,),), ((*others,),) = (corpora.read(tmp_path / out).values() for out in ("plain", "scored"))
    assert_alike(rows, others)
