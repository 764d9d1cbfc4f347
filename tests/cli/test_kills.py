"""Commands that are killed at random moments end, run again, in the results of an undisturbed run, and leave nothing else.

`SECATEUR_KILLS` is the number of kills of each command, 30 by default, and `SECATEUR_KILLS_SEED` the seed of their moments.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpora
import pytest
from cases import CASES
from safetensors.torch import load_file

import secateur
from secateur.data import builtin

pytestmark = pytest.mark.slow

KILLS, SEED = int(os.environ.get("SECATEUR_KILLS", "30")), int(os.environ.get("SECATEUR_KILLS_SEED", "0"))
# Tiny models end before the first checkpoint of an attribution would be due.
START = """
import sys
import secateur.attribution.checkpoint as checkpoint
checkpoint.MIN_SECONDS, checkpoint.MAX_SHARE = 0.0, 1e9
from secateur.cli import main
main()
"""
FAST = "--threads 1"
LABELS = "hotels,medicine,products,reviews"


def weights(folder: Path) -> dict[str, Any]:
    """All tensors of all safetensors files below a folder, as lists."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
    return {
        f"{path.relative_to(folder)} {name}": tensor.double().flatten().tolist()
        for path in paths
        for name, tensor in load_file(path).items()
    }


def sweep_results(out: Path) -> Any:
    """Scores, and all figures of the points that no clock measures."""
    measured = ("latency_ms", "speedup", "speedup_low", "speedup_high", "examples_per_second")
    points = json.loads((out / "sweep.json").read_text())["points"]
    return weights(out), [{name: value for name, value in point.items() if name not in measured} for point in points]


def gates_results(out: Path) -> Any:
    report = json.loads((out / "model" / "report.json").read_text())
    return weights(out), [report[name] for name in ("training", "deleted", "z", "evaluation", "parameters")]


def multitask_results(out: Path) -> Any:
    report = json.loads((out / "report.json").read_text())
    return weights(out), {name: value for name, value in report.items() if name != "seconds"}


def score_results(out: Path) -> Any:
    summary = json.loads((out / "summary.json").read_text())
    counts = [summary[name] for name in ("rows", "scored", "rejected", "shards", "failed")]
    return counts, corpora.read(out), corpora.rejects(out)


@dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
        line: Its arguments, without --out.
        results: Reads the results from its output.
        again: Further arguments of a run that continues a begun folder.
    """

    line: str
    results: Callable[[Path], Any]
    again: str = ""


COMMANDS = {
    "prune": Command(f"prune m --data train.jsonl --keep 0.5 --lengths 8 --batch-sizes 1 {FAST}", weights),
    "attribute": Command(f"attribute m --data train.jsonl --max-tokens 64 --checkpoint sums {FAST}", weights, "--resume"),
    "sweep": Command(f"sweep m --data train.jsonl --eval train.jsonl --keeps 0.9,0.5 --length 8 {FAST}", sweep_results),
    "score": Command(
        f"score m --data corpus/* --max-tokens 256 --dtype float32 --compile off --engine-runtime torch {FAST}",
        score_results,
        "--resume",
    ),
    "multitask": Command(f"multitask config.yaml {FAST}", multitask_results, "--resume"),
    "layer-gates": Command(
        f"layer-gates builtin --data movie.jsonl --keep-layers 3 --steps 12 --batch-size 4 --lengths 8 --batch-sizes 1 {FAST}",
        gates_results,
        "--resume",
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and the data of all commands."""
    folder, case = tmp_path_factory.mktemp("inputs"), CASES["bert-sequence"]
    secateur.save(case.model(), folder / "m", tokenizer=case.task.reader)
    rows = [{"input": row["input"], "target": row["target"]} for row in case.examples] * 8
    written(folder / "train.jsonl", rows)
    written(folder / "movie.jsonl", builtin.examples("movie")[:24])
    written(folder / "length.jsonl", [{"input": row["input"], "target": len(row["input"]) / 100} for row in rows[:24]])
    (folder / "corpus").mkdir()
    for shard in range(6):
        corpora.lines(folder / "corpus", [*corpora.texts(300, seed=shard), ""], f"{shard}.txt")
    training = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 1e-3}
    tasks = {"movie": {"data": "movie.jsonl", "eval": "movie.jsonl"}, "length": {"data": "length.jsonl", "kind": "regression"}}
    config = {"model": "builtin", "tasks": tasks, "pruning": {"density": 0.2}, "training": training, "max_length": 32}
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def written(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def started(folder: Path, line: str) -> subprocess.Popen[bytes]:
    """Start the command."""
    return subprocess.Popen(
        [sys.executable, "-c", START, *line.split()], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Wait for the command; return its exit code and its messages."""
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors.decode()


def require_nothing_left(folder: Path, inputs: Path) -> None:
    """Check that a finished command has left its inputs, its output and nothing else, also no hidden files inside."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in inputs.iterdir()} | {"out"}
    hidden = {path.name for path in folder.rglob(".*")} - {".lock"}  # Of `score`, which keeps it in its folder.
    assert not hidden
    assert not (folder / "out" / "checkpoints").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_commands_end_in_the_same_results(name: str, inputs: Path, tmp_path: Path) -> None:
    command, draws = COMMANDS[name], random.Random(f"{SEED} {name}")
    shutil.copytree(inputs, tmp_path / "whole")
    began = time.perf_counter()
    code, errors = ended(started(tmp_path / "whole", f"{command.line} --out out"))
    assert code == 0, errors
    seconds = time.perf_counter() - began
    expected = command.results(tmp_path / "whole" / "out")
    require_nothing_left(tmp_path / "whole", inputs)
    in_time, began = 0, time.perf_counter()
    for number in range(KILLS):
        folder = tmp_path / f"killed-{number}"
        shutil.copytree(inputs, folder)
        moment = draws.triangular(0, seconds, seconds)  # Late moments are more likely: the start only imports packages.
        process = started(folder, f"{command.line} --out out")
        time.sleep(moment)
        process.kill()
        code, _ = ended(process)
        in_time += code == -signal.SIGKILL
        if code:
            code, errors = ended(started(folder, f"{command.line} --out out {command.again}"))
            # A kill after the last rename leaves a whole output, which is refused as one that exists.
            complete = code == 2 and "which exists" in errors and name in ("prune", "attribute", "sweep")
            assert code == 0 or complete, (moment, errors)
        assert command.results(folder / "out") == expected, moment
        require_nothing_left(folder, inputs)
        shutil.rmtree(folder)
    each = (time.perf_counter() - began) / KILLS
    print(f"{name}: {in_time} of {KILLS} killed, {seconds:.1f} s undisturbed, {each:.1f} s a kill")
    assert in_time >= KILLS / 2
