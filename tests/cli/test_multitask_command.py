"""`secateur multitask` on the built-in encoder: the files of a run, resumed runs, and one line for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, word_tokenizer
from command import Run
from encoders import encoder, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForTextEncoding, AutoTokenizer

import secateur
from secateur.data import builtin
from secateur.learned.multitask.encoder_tasks import Classification, Regression
from secateur.learned.multitask.exporting import load, save
from secateur.learned.multitask.model import MultitaskModel, encoder_of
from secateur.learned.multitask.training import evaluate_task
from secateur.support.ledger import CELLS

CONFIG: dict[str, Any] = {
    "model": "builtin",
    "tasks": {
        "movie": {"data": "movie.jsonl", "eval": "movie.test.jsonl"},
        "length": {"data": "length.jsonl", "kind": "regression"},
    },
    "pruning": {"density": 0.2},
    "training": {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 1e-3},
    "max_length": 32,
}


def config(name: str = "c.yaml", **changes: Any) -> str:
    """Write CONFIG with some sections replaced. JSON is valid YAML."""
    Path(name).write_text(json.dumps({**CONFIG, **changes}))
    return name


@pytest.fixture
def run_here(run: Run) -> Run:
    """`run`, in a folder with the data files of CONFIG's tasks."""
    rows = builtin.examples("movie")[:24]
    lengths = [{"input": row["input"], "target": len(row["input"]) / 100} for row in rows]
    rows_by_name = {"movie": rows, "movie.test": builtin.examples("movie.test")[:16], "length": lengths}
    for name, file_rows in rows_by_name.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in file_rows))
    return run


def document(folder: str) -> dict[str, Any]:
    """A run's report, without the time that it took."""
    report: dict[str, Any] = json.loads(Path(folder, "report.json").read_text())
    assert report.pop("seconds") >= 0
    return report


def weights(folder: str) -> dict[str, torch.Tensor]:
    encoder: dict[str, torch.Tensor] = load_file(Path(folder, "model", "encoder", "model.safetensors"))
    heads: dict[str, torch.Tensor] = load_file(Path(folder, "model", "heads.safetensors"))
    return encoder | heads


def test_a_run_writes_its_model_and_its_report(run_here: Run) -> None:
    result = run_here(f"multitask {config()} --out r --json")
    assert result.code == 0, result.errors
    assert result.document == json.loads(Path("r/report.json").read_text()) | {"out": "r"}
    assert sorted(path.name for path in Path("r").iterdir()) == [
        "cells.jsonl",
        "model",
        "report.json",
        "run.yaml",
        "settings.json",
        "training.jsonl",
    ]
    report = document("r")
    expected = {"method": "movement", "granularity": "element", "scope": "global", "density": 0.2}
    assert report["settings"] == {**expected, "schedule": {"warmup": 0.25, "cooldown": 0.25}}
    # The report describes the model in the folder.
    model, (dense, pieces) = load("r/model"), builtin.load()
    linears = [m for name, m in model.encoder.named_modules() if isinstance(m, torch.nn.Linear)]
    nonzero, total = (
        sum(count(m) for m in linears) for count in (lambda m: int((m.weight != 0).sum()), lambda m: m.weight.numel())
    )
    assert (report["weights"], report["density"]) == (nonzero, nonzero / total)
    assert nonzero == round(0.2 * total)
    assert report["parameters"]["dense"] == report["parameters"]["pruned"] < secateur.cost.parameters(dense)
    sizes = {"dense checkpoint": "encoder/model.safetensors", "sparse checkpoint": "encoder.sparse.safetensors"}
    assert report["bytes"] == {name: Path("r/model", file).stat().st_size for name, file in sizes.items()}
    assert report["bytes"]["sparse checkpoint"] < report["bytes"]["dense checkpoint"]
    assert set(report["tasks"]) == {"movie"}  # The other task has no evaluation data.
    rows = [json.loads(line) for line in Path("movie.test.jsonl").read_text().splitlines()]
    features = model.tasks["movie"].features(pieces, rows, 32)
    assert report["tasks"]["movie"] == pytest.approx(evaluate_task(model, "movie", rows, features, pieces).to_json(), abs=1e-6)
    lines = Path("r/training.jsonl").read_text()
    log = [json.loads(line) for line in lines.splitlines()]
    # Warm-up ends at step 1.5, and the last density is reached at 4.5.
    exact = [1, *(0.2 + 0.8 * (1 - (step - 1.5) / 3) ** 3 for step in (2, 3, 4)), 0.2, 0.2, 0.2]
    assert [row["density"] for row in log] == pytest.approx(exact, abs=1e-6)
    assert log[-1]["density"] == report["density"]
    # Stock transformers reads the encoder, whose tokenizer is in the same folder.
    stock = AutoModelForTextEncoding.from_pretrained("r/model/encoder").state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in model.encoder.state_dict().items())
    assert AutoTokenizer.from_pretrained("r/model/encoder")("so")["input_ids"] == pieces("so")["input_ids"]

    # A second run prints the same at once: nothing is trained, and no model is written.
    stamps = {path: path.stat().st_mtime_ns for path in Path("r").rglob("*") if path.is_file() and path.parent.name != "r"}
    again = run_here("multitask c.yaml --out r --resume")
    assert again.code == 0
    assert "movie" in again.out
    assert "movement, element, global: 0.2000 of the encoder's linear weights stay" in again.out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert Path("r/training.jsonl").read_text() == lines  # The log also holds the seconds that training took.
    assert json.loads(Path("r/report.json").read_text()) | {"out": "r"} == result.document
    # Another config is another run.
    refused = run_here(f"multitask {config('other.yaml', pruning={'density': 0.3})} --out r --resume")
    assert refused.code == 2
    assert "secateur: config: 'r' was begun with {" in refused.errors[-1]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps

    # Initial scores may come from a run's model.
    began = run_here(f"multitask {config('began.yaml', pruning={'density': 0.2, 'initial_scores': 'r/model'})} --out s --json")
    assert began.code == 0, began.errors
    assert any(not torch.equal(tensor, weights("r")[name]) for name, tensor in weights("s").items())


def test_a_killed_run_is_resumed(run_here: Run, tmp_path: Path) -> None:
    """A run is killed once it has a checkpoint, and again after the training, when only the last line is missing."""
    training = {**CONFIG["training"], "max_steps": 12, "logging_steps": 1, "save_steps": 2}
    config(training=training)
    command = [
        sys.executable,
        "-c",
        "from secateur.cli import main; main()",
        "multitask",
        "c.yaml",
        "--out",
        "killed",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("killed/checkpoints/checkpoint-*/trainer_state.json")):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    assert run_here("multitask c.yaml --out killed --resume --json").code == 0
    assert run_here("multitask c.yaml --out whole --json").code == 0
    assert document("killed") == document("whole")
    ours, theirs = weights("killed"), weights("whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    logs = [
        [json.loads(line) for line in Path(name, "training.jsonl").read_text().splitlines()] for name in ("killed", "whole")
    ]
    assert logs[0][:-1] == logs[1][:-1]  # The last line holds times.
    assert len(logs[0]) == 13
    assert not list(Path().glob("*/checkpoints"))
    Path("killed", CELLS).write_text("")
    Path("killed", "report.json").unlink()
    assert run_here("multitask c.yaml --out killed --resume --json").code == 0
    assert document("killed") == document("whole")


def test_tasks_of_all_kinds_by_ranks(run_here: Run) -> None:
    texts = [row["input"] for row in builtin.examples("movie")[:12]]
    rows = [{"question": "which?", "context": t, "answers": {"text": [t[:5]], "answer_start": [0]}} for t in texts]
    Path("span.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"input": "a", "pair": "b", "target": target} for target in (0, 1, 1, 0)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    tasks = {
        "where": {"data": "span.jsonl", "eval": "span.jsonl", "kind": "span"},
        "same": {"data": "pairs.jsonl", "eval": "pairs.jsonl", "pair": True, "metric": "matthews"},
        "length": {"data": "length.jsonl", "eval": "length.jsonl", "kind": "regression"},
        "language": {"data": "builtin:language", "examples": 40},
    }
    pruning = {"method": "magnitude", "granularity": "rank", "scope": "local", "density": 0.3}
    result = run_here(f"multitask {config(tasks=tasks, pruning=pruning, max_length=96, pooling='first')} --out r --json")
    assert result.code == 0, result.errors
    report = document("r")
    assert {name: about["metric"] for name, about in report["tasks"].items()} == {
        "where": "f1",
        "same": "matthews",
        "length": "pearson",
    }
    assert report["density"] <= 0.3
    assert report["parameters"]["pruned"] < report["parameters"]["dense"]
    assert set(report["bytes"]) == {"dense checkpoint"}
    assert load("r/model").tasks["language"].outputs == 8


def text(content: str | bytes) -> Callable[[], str]:
    def write() -> str:
        Path("c.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return "c.yaml"

    return write


def changed(**changes: Any) -> Callable[[], str]:
    return lambda: config(**changes)


def task(**about: Any) -> Callable[[], str]:
    """CONFIG with another first task."""
    return lambda: config(tasks={**CONFIG["tasks"], "movie": {**CONFIG["tasks"]["movie"], **about}})


def training(**arguments: Any) -> Callable[[], str]:
    return lambda: config(training={**CONFIG["training"], **arguments})


def with_rows(*rows: dict[str, Any], **about: Any) -> Callable[[], str]:
    """CONFIG with other rows of the first task."""

    def write() -> str:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return task(data="rows.jsonl", **about)()

    return write


def with_test_rows(*rows: dict[str, Any]) -> Callable[[], str]:
    def write() -> str:
        Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return task(eval="test.jsonl")()

    return write


def decoder() -> str:
    secateur.save(CASES["llama"].model(), "llama", tokenizer=word_tokenizer(start=True, end=False))
    return config(model="./llama")


def scores_of_another_encoder() -> str:
    trained = MultitaskModel(encoder("t5-relu"), {"movie": Classification(("bad", "good")), "length": Regression()})
    save(trained, "trained", tokenizer=tokenizer("t5-relu"))
    return config(pruning={"initial_scores": "trained"})


def scores_by_magnitude() -> str:
    model, pieces = builtin.load()
    untrained = MultitaskModel(encoder_of(model), {"movie": Classification(("bad", "good")), "length": Regression()})
    save(untrained, "trained", tokenizer=pieces)
    return config(pruning={"method": "magnitude", "initial_scores": "trained"})


GOOD, OTHER = {"input": "movie review: fine", "target": "good"}, {"input": "movie review: dull", "target": "bad"}
RANK = {"granularity": "rank"}
BAD: dict[str, tuple[Callable[[], str], str]] = {
    "missing file": (lambda: "nothing.yaml", "config: no such file: 'nothing.yaml'"),
    "a folder": (lambda: ".", "config: expected a file, got the folder '.'"),
    "broken YAML": (text("model: [builtin\ntasks: {"), "config: 'c.yaml' is no YAML: while parsing a flow "),
    "no text": (text(b"\xff\xfe\x00"), "config: cannot read 'c.yaml': "),
    "empty": (text(""), "config: expected values by name, got None"),
    "a list": (text("- model"), "config: expected values by name, got ['model']"),
    "unknown section": (changed(prunning={}), "config: expected some of model, tasks, pruning, schedule, "),
    "unknown field": (changed(pruning={"densty": 0.1}), "pruning: expected some of method, granularity, scope, "),
    "unknown field of a task": (task(file="x"), "tasks.movie: expected some of data, eval, kind, labels, "),
    "no model": (text("tasks: {a: 'builtin:movie'}"), "config: expected 'model', got 'tasks'"),
    "no tasks": (text("model: builtin"), "config: expected 'tasks', got 'model'"),
    "tasks as a list": (changed(tasks=["movie"]), "tasks: expected tasks by name, got ['movie']"),
    "no task": (changed(tasks={}), "tasks: expected tasks by name, got {}"),
    "no data": (changed(tasks={"a": {"kind": "span"}}), "tasks.a: expected 'data', got 'kind'"),
    "wrong type": (changed(pruning={"density": "low"}), "pruning.density: expected float, got 'low'"),
    "wrong type of a length": (changed(max_length=True), "config.max_length: expected int, got True"),
    "wrong type of a section": (changed(schedule=[0.1]), "schedule: expected values by name, got [0.1]"),
    "unknown kind": (task(kind="tagging"), "tasks.movie.kind: expected one of classification, regression, span, got 'tagging'"),
    "unknown metric": (task(metric="f1"), "movie: metric: expected accuracy or matthews, got 'f1'"),
    "labels as text": (task(labels="good"), "tasks.movie.labels: expected a list of names, got 'good'"),
    "one label only": (task(labels=["good"]), "movie: labels: expected at least two different labels, got ['good']"),
    "one label in the data": (with_rows(GOOD, GOOD), "movie: labels: expected at least two different labels, got ['good']"),
    "a label beyond": (task(labels=["good", "poor"]), "movie: examples, row "),
    "learning rate of what": (changed(learning_rates={"heads": 1}), "scores, sigma, got 'heads': 1"),
    "learning rate of a word": (changed(learning_rates={"scores": "x"}), "learning_rates: expected numbers for some of "),
    "no steps": (changed(training={}), "training: expected max_steps or num_train_epochs, got neither"),
    "unknown training argument": (training(step=3), "got an unexpected keyword argument 'step'"),
    "training argument of a wrong type": (training(weight_decay="x"), "training.weight_decay: expected float, got 'x'"),
    "evaluation in training": (training(eval_strategy="steps", eval_steps=1), "training.eval_strategy: expected 'no' "),
    "method": (changed(pruning={"method": "luck"}), "method: expected magnitude or movement, got 'luck'"),
    "density": (changed(pruning={"density": 1.5}), "density: expected a share of the encoder's weights in (0, 1], got 1.5"),
    "density too small for ranks": (changed(pruning={**RANK, "density": 1e-4}), "density: expected at least 0.000"),
    "density too small for local ranks": (
        changed(pruning={**RANK, "density": 0.001, "scope": "local"}),
        "density: expected at least 0.00825, the nearest that keeps one rank of each matrix, got 0.001",
    ),
    "schedule": (changed(schedule={"warmup": 0.5, "cooldown": 0.5}), "cooldown: expected less than 1 - warmup = 0.5, got 0.5"),
    "pooling": (changed(pooling="max"), "pooling: expected mean or first, got 'max'"),
    "length": (changed(max_length=0), "movie: max_length: expected more than 1, the number of the tokenizer's marks, got 0"),
    "no such model": (changed(model="./nothing"), "model: no such model folder: './nothing'"),
    "a decoder": (decoder, "model: './llama' cannot be loaded as an encoder: "),
    "a task with a point": (changed(tasks={"a.b": "movie.jsonl"}), "tasks: expected names without points, got 'a.b'"),
    "a task named as torch's": (changed(tasks={"train": "movie.jsonl"}), "tasks: expected names that torch.nn.ModuleDict "),
    "no such data": (task(data="nope.jsonl"), "data: no such file: 'nope.jsonl'"),
    "no rows": (with_rows(), "expected at least one example, got none"),
    "a null": (with_rows(GOOD, OTHER, {**GOOD, "target": None}), "row 3: expected a value in column 'target', got null"),
    "fewer than no examples": (task(examples=0), "tasks.movie.examples: expected at least 1, got 0"),
    "no pair": (task(pair=True), "columns: expected the column 'pair', got 'input', 'target'; name"),
    "a number as text": (with_rows(GOOD, {**OTHER, "input": 5}), "movie: examples, row 2: expected text in column "),
    "a word as number": (with_rows(GOOD, kind="regression"), "movie: examples, row 1: expected a number as target, got 'good'"),
    "a label beyond in the evaluation": (
        with_test_rows(GOOD, {**GOOD, "target": "fine"}),
        "movie, eval: examples, row 2: expected a target among the labels 'bad', 'good' or its number, got 'fine'",
    ),
    "no such scores": (changed(pruning={"initial_scores": "none"}), "model: 'none' is no folder of a multitask model"),
    "scores of another encoder": (
        scores_of_another_encoder,
        "initial_scores: expected a model whose encoder has the same shapes, got other shapes",
    ),
    "scores by magnitude": (
        scores_by_magnitude,
        "initial_scores: expected them with method 'movement', got 'magnitude'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(run_here: Run, name: str) -> None:
    make, message = BAD[name]
    file = make()
    before = sorted(str(path) for path in Path().rglob("*"))
    result = run_here(f"multitask {file} --out r")
    assert result.code == 2, result.errors
    assert message in result.errors[-1]
    assert result.errors[-1].startswith("secateur: ")
    assert not any("Traceback" in error for error in result.errors)
    assert result.out == ""
    assert sorted(str(path) for path in Path().rglob("*")) == before, "something was left behind"


@pytest.mark.parametrize(
    ("out", "message"), [("full", "out: expected a new folder or one that this command began"), ("no/r", "parent")]
)
def test_an_unusable_output_folder(run_here: Run, out: str, message: str) -> None:
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("precious")
    result = run_here(f"multitask {config()} --out {out}")
    assert result.code == 2
    assert message in result.errors[-1]
    assert [path.name for path in Path("full").iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_processes_of_torchrun_share_a_run(run_here: Run) -> None:
    """Only the first process writes. Both choose the same masks, or their gradients would belong to different models."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "secateur"]
    command = [*launcher, *f"multitask {config()} --out r --threads 1 --json".split()]
    first = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    report = document("r")
    assert json.loads(first.stdout)["weights"] == report["weights"]
    assert report["density"] == pytest.approx(0.2, abs=1e-6)
    # The run is finished, so neither process trains again.
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=600, check=True)
    assert json.loads(again.stdout) == json.loads(first.stdout)
