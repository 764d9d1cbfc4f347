"""--overwrite replaces an output of secateur by a complete new one. --resume continues what was begun, nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Run, assert_refused

from secateur.attribution import checkpoint
from secateur.cli.shared import run_file
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


NEW_FOLDERS = {
    "prune": f"{PRUNE} --keep 0.5",
    "sweep": "sweep builtin --data train.jsonl --eval test.jsonl --examples 8 --keeps 0.5 --batch-size 1 --length 8",
    "benchmark": "benchmark builtin builtin --batch-sizes 1 --lengths 8 --pairs 3",
}


@pytest.mark.parametrize("verb", NEW_FOLDERS)
def test_a_command_that_is_killed_after_its_folder_got_its_name_leaves_a_folder_that_can_be_replaced(
    verb: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(run_file, "_keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(f"{NEW_FOLDERS[verb]} --out d").code == 130
    before = Path("d/run.yaml").read_text()
    assert f"command: {verb}" in before
    Path("d/note").touch()
    assert run(f"{NEW_FOLDERS[verb]} --out d --overwrite").code == 0
    assert Path("d/run.yaml").read_text() == before
    assert not Path("d/note").exists()


RUN_VERBS = {
    "layer-gates": "layer-gates none --data none.jsonl --keep-layers 3",
    "multitask": "multitask none.yaml",
    "ldnet train-lm": "ldnet train-lm none.txt --steps 1",
    "ldnet train-tagger": "ldnet train-tagger none --data none --eval none --target-column ner",
    "reproduce ap": "reproduce ap --preset none",
    "reproduce multitask": "reproduce multitask --preset none",
    "reproduce ldnet": "reproduce ldnet --data none --eval none --target-column ner=ner",
}


@pytest.mark.parametrize("verb", RUN_VERBS)
def test_the_help_says_why_a_run_folder_is_not_overwritten(verb: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert "Hence there is no --overwrite: delete a former run yourself." in run(f"{verb} --help").out
    assert "No such option: --overwrite" in run(f"{RUN_VERBS[verb]} --out r --overwrite").errors[-1]


@pytest.mark.parametrize("verb", RUN_VERBS)
def test_a_begun_run_folder_needs_resume(verb: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("r").mkdir()
    Path("r/settings.json").write_text("{}")
    message = "out: 'r' was begun already; add --resume to continue it, or name a new folder"
    result = run(f"{RUN_VERBS[verb]} --out r")
    assert (result.code, result.errors) == (2, [f"secateur: {message}"])
    for options in ("--out r --resume", "--out new"):
        refused = run(f"{RUN_VERBS[verb]} {options}")  # The inputs are wrong.
        assert refused.code == 2
        assert "begun already" not in refused.errors[-1]
    monkeypatch.setenv("RANK", "1")  # Another process of torchrun, after the first one began the folder.
    assert "begun already" not in run(f"{RUN_VERBS[verb]} --out r").errors[-1]


def test_partial_sums_need_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "MAX_SHARE", float("inf"))
    line = "attribute builtin --data train.jsonl --max-tokens 64 --checkpoint c --out"
    assert run(f"{line} whole").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Checkpoint, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(f"{line} s").code == 130
    assert list(Path("c").glob("process-*"))
    message = "checkpoint: 'c' was begun already; add --resume to continue it"
    assert_refused(run(f"{line} s"), message, "s")
    assert list(Path("c").glob("process-*"))
    assert run(f"{line} s --resume").code == 0
    assert Path("s").read_bytes() == Path("whole").read_bytes()
    assert not Path("c").exists()
    assert run(f"{line} t --resume").code == 0  # There is nothing to continue.
