"""--overwrite: an existing output of secateur is replaced by a complete new one, and by nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Run, assert_refused

from secateur.flow.compress import Compressed

PRUNE = "prune builtin --data train.jsonl --examples 8 --recover none --batch-sizes 1 --lengths 8"


def test_prune_replaces_its_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(f"{PRUNE} --keep 0.5 --out d --overwrite").code == 0  # Nothing is there yet.
    first = Path("d/plan.json").read_text()
    Path("d/note").touch()
    assert "which exists" in run(f"{PRUNE} --keep 0.4 --out d").errors[-1]
    with monkeypatch.context() as patched:
        patched.setattr(Compressed, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert run(f"{PRUNE} --keep 0.4 --out d --overwrite").code == 1
    assert Path("d/plan.json").read_text() == first
    assert run(f"{PRUNE} --keep 0.4 --out d --overwrite").code == 0
    assert Path("d/plan.json").read_text() != first
    assert not Path("d/note").exists()
    assert "overwrite" not in Path("d/run.yaml").read_text()
    assert sorted(path.name for path in Path().iterdir()) == ["d", "test.jsonl", "train.jsonl"]
    result = run(f"{PRUNE.replace('builtin', 'd')} --keep 0.5 --out d --overwrite")
    assert result.errors == ["secateur: overwrite: expected an output that is no input, got 'd', which model names"]
    assert run("prune --config d/run.yaml --keep 0.5 --out d --overwrite").code == 0
    assert Path("d/plan.json").read_text() == first


def test_files_of_scores_and_plans_are_replaced(run: Run) -> None:
    attribute = "attribute builtin --data train.jsonl --examples 8 --out s"
    assert run(attribute).code == 0
    before = Path("s").read_bytes()
    assert_refused(run(attribute), "out: expected a file that does not exist yet", "none")
    assert run(f"{attribute} --overwrite --criterion magnitude").code == 0
    assert Path("s").read_bytes() != before
    assert run("plan s --keep 0.5 --out p").code == 0
    assert run("plan s --keep 0.4 --out p --overwrite").code == 0
    assert json.loads(Path("p").read_text())["budget"]["keep"] == 0.4
    assert_refused(run("plan s --keep 0.4 --out s --overwrite"), "overwrite: expected an output that is no input", "none")
    rows = Path("train.jsonl").read_bytes()
    assert_refused(run("plan s --keep 0.4 --out train.jsonl --overwrite"), "overwrite: expected a file that secateur", "none")
    assert Path("train.jsonl").read_bytes() == rows
