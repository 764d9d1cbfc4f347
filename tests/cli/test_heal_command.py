"""`secateur heal` and `prune --heal`: the folder, its report, killed and resumed runs, and one line for bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from command import Run, assert_refused, killed_in, same_weights

import secateur

PRUNE = "prune builtin --data train.jsonl --params 0.4 --effort low --recover none --threads 1 --batch-sizes 1 --lengths 8"
LINE = "heal cut --data train.jsonl --epochs 2 --batch-size 4 --threads 1 --batch-sizes 1 --lengths 8"


@pytest.fixture
def cut(run: Run) -> None:
    """Write a pruned folder, "cut"."""
    result = run(f"{PRUNE} --out cut")
    assert result.code == 0, result.errors


@pytest.mark.usefixtures("cut")
def test_a_folder_is_healed_into_a_new_one(run: Run) -> None:
    before = {path: path.read_bytes() for path in Path("cut").iterdir()}
    result = run(f"{LINE} --eval test.jsonl --out healed --json")
    assert result.code == 0, result.errors
    document = result.document
    report = json.loads(Path("healed/report.json").read_text())
    assert document == report
    divergence = report["healing"]["divergence"]
    assert divergence["after"] < divergence["before"]
    assert report["healing"]["examples"] == {"fitted": 38, "held_out": 10}
    evaluated = run("evaluate healed --data test.jsonl --json").document
    assert evaluated["value"] == report["evaluation"]["pruned"]["value"]
    assert report["before"]["value"] == run("evaluate cut --data test.jsonl --json").document["value"]
    assert secateur.Plan.load("healed/plan.json") == secateur.Plan.load("cut/plan.json")
    assert secateur.load("healed").dtype == secateur.load("cut").dtype
    assert not same_weights(Path("healed"), Path("cut"))
    assert {path: path.read_bytes() for path in Path("cut").iterdir()} == before
    assert yaml.safe_load(Path("healed/run.yaml").read_text())["command"] == "heal"
    # A healed folder knows its dense model too.
    assert run(f"{LINE.replace('cut', 'healed')} --epochs 0.2 --out twice").code == 0


@pytest.mark.usefixtures("cut")
def test_a_killed_run_goes_on(run: Run, tmp_path: Path) -> None:
    whole = run(f"{LINE} --out whole")
    assert whole.code == 0, whole.errors
    killed_in(tmp_path, f"{LINE} --checkpoint run --out again", "run/training")
    assert not Path("again").exists()
    refused = run(f"{LINE} --checkpoint run --out again")
    assert_refused(refused, "checkpoint: 'run' was begun already; add --resume to continue it", "again")
    resumed = run(f"{LINE} --checkpoint run --resume --out again")
    assert resumed.code == 0, resumed.errors
    assert same_weights(Path("whole"), Path("again"))
    assert not Path("run").exists()


@pytest.mark.usefixtures("cut")
def test_bad_input_is_one_line(run: Run) -> None:
    assert_refused(run(f"{LINE} --minutes 1 --out h"), "epochs: expected epochs or minutes, got both", "h")
    assert_refused(run(f"{LINE} --targets x --out h"), "targets: expected some of labels, all, teacher, got 'x'", "h")
    assert_refused(run(f"{LINE} --resume --out h"), "resume: expected none without --checkpoint", "h")
    assert_refused(run(f"{LINE} --teacher nowhere --out h"), "teacher: no such model", "h")
    assert_refused(run(f"{LINE} --teacher cut --examples 9 --out h"), "examples: expected at least 10", "h")
    assert_refused(run(f"{LINE} --out cut/report.json"), "out: ", "h")
    shutil.move("cut/run.yaml", "kept.yaml")
    shutil.move("cut/README.md", "kept.md")
    assert_refused(
        run(f"{LINE} --out h"), "teacher: expected the dense model that 'cut' was made from, got none: give --te", "h"
    )


def test_prune_heals(run: Run) -> None:
    result = run(f"{PRUNE} --heal 0.1 --eval test.jsonl --out cut --json")
    assert result.code == 0, result.errors
    healing = result.document["healing"]
    assert healing["divergence"]["after"] < healing["divergence"]["before"]
    assert healing["settings"]["minutes"] == 0.1
    evaluated = run("evaluate cut --data test.jsonl --json").document
    assert evaluated["value"] == result.document["evaluation"]["pruned"]["value"]
    assert_refused(run(f"{PRUNE} --heal 0 --out h"), "heal: expected a positive number, got 0", "h")
