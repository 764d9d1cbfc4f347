"""`secateur ldnet`: both trainings, killed and resumed runs, tags of streamed text, and one line for bad input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import COMMAND, Result, Run, assert_refused, killed_in, same_weights
from ldnet_toys import write_columns, write_text

LM = "ldnet train-lm text --layers 2 --width 8 --embedding 8 --batch-size 8 --learning-rate 0.01 --min-count 1 --threads 1"
TAGGER = (
    "ldnet train-tagger lm --data train.conll --eval dev.conll --target-column 3 --features 8 --word-width 8 --hidden 8 "
    "--batch-size 4 --learning-rate 0.1 --threads 1"
)


@pytest.fixture
def files(run: Run) -> Path:
    """The folder of the commands, with their input files."""
    write_text(Path("text"))
    write_text(Path("more"), 20, seed=1)
    write_columns(Path("train.conll"))
    write_columns(Path("dev.conll"), 20, seed=1)
    return Path.cwd()


def document_of(result: Result) -> Any:
    """The only JSON document on stdout."""
    return json.loads(result.out)


def test_from_text_to_tags(run: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = run(f"{LM} --out lm --steps 30 --eval more --json")
    assert learned.code == 0
    assert set(document_of(learned)["perplexity"]) == {"forward", "backward"}
    assert all(1 < value < 15 for value in document_of(learned)["perplexity"].values())
    assert document_of(learned) == {"out": "lm", **json.loads(Path("lm/report.json").read_text())}
    result = run(f"{TAGGER} --out t --epochs 8 --prune-epochs 3 --lambda0 2 --wanted 1 --json")
    assert result.code == 0
    document = document_of(result)
    assert document["data"] == {
        "file": "train.conll", "sentences": 60, "scheme": "bio2", "tags": document["data"]["tags"], "repaired": 0,
    }  # fmt: skip
    before, after = (document["evaluation"][name] for name in ("before", "after"))
    assert before["metric"] == "F1"
    assert before["value"] > 0.9
    assert after["examples"] == 20
    assert document["layers"]["before"] == 4
    gates = [gate for of_direction in document["gates"].values() for gate in of_direction]
    assert document["layers"]["after"] == sum(gate > 0 for gate in gates)
    assert document["flops per word"]["after"]["all"] <= document["flops per word"]["before"]["all"]
    names = {path.name for path in Path("t").iterdir()}
    assert names == {
        "settings.json", "run.yaml", "cells.jsonl", "report.json", "whole", "model", "training-whole.jsonl",
        "training-pruned.jsonl",
    }  # fmt: skip
    # The same command again trains nothing, and prints the same.
    again = run(f"{TAGGER} --out t --epochs 8 --prune-epochs 3 --lambda0 2 --wanted 1 --resume")
    assert again.code == 0
    assert "MFLOPs a word" in again.out
    assert {path.name for path in Path("t").iterdir()} == names
    Path("raw").write_text("Mr Ada sees Eastville .\n\nMs Bob Cy likes Northville .\n")
    tagged = run("ldnet tag t/whole raw")
    lines = ["Mr\tO", "Ada\tB-PER", "sees\tO", "Eastville\tB-LOC", ".\tO"]
    assert tagged.out.split("\n")[:7] == [*lines, "", ""]
    assert tagged.out.endswith("\n\n")
    rows = document_of(run("ldnet tag t/whole raw --json --scheme bioes"))["sentences"]
    assert [row["tokens"] for row in rows] == [
        ["Mr", "Ada", "sees", "Eastville", "."],
        [],
        ["Ms", "Bob", "Cy", "likes", "Northville", "."],
    ]
    assert rows[0]["tags"] == ["O", "S-PER", "O", "S-LOC", "O"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(Path("raw").read_bytes())))
    assert run("ldnet tag t/whole --batch-size 1").out == tagged.out


def test_tags_are_streamed(run: Run, files: Path) -> None:
    """The first sentence's tags are printed before the second sentence arrives."""
    assert run(f"{LM} --out lm --steps 2").code == 0
    assert run(f"{TAGGER} --out t --epochs 1 --prune-epochs 1").code == 0
    process = subprocess.Popen(
        [*COMMAND, "ldnet", "tag", "t", "--batch-size", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for sentence in ("Mr Ada", "Ms Bob sees"):
        process.stdin.write(sentence + "\n")
        process.stdin.flush()
        for token in sentence.split():
            assert process.stdout.readline().startswith(f"{token}\t")
        assert process.stdout.readline() == "\n"
    process.stdin.close()
    assert process.wait() == 0
    assert process.stdout.read() == ""
    process.stdout.close()


def test_killed_runs_give_the_same_models(run: Run, files: Path) -> None:
    line = f"{LM} --steps 40 --save-steps 10"
    killed_in(files, f"{line} --out killed", "killed/checkpoints")
    assert not Path("killed/model").exists()
    assert run(f"{line} --out killed --resume").code == 0
    assert run(f"{line} --out lm").code == 0
    assert same_weights(Path("killed/model"), Path("lm/model"))
    line = f"{TAGGER} --epochs 2 --prune-epochs 4 --lambda0 1"
    killed_in(files, f"{line} --out killed-tagger", "killed-tagger/checkpoints-whole")
    killed_in(files, f"{line} --out killed-tagger --resume", "killed-tagger/checkpoints-pruned")
    assert not Path("killed-tagger/model").exists()
    assert run(f"{line} --out killed-tagger --resume").code == 0
    assert run(f"{line} --out whole-tagger").code == 0
    for name in ("whole", "model"):
        assert same_weights(Path("killed-tagger", name), Path("whole-tagger", name))
    one, other = (json.loads(Path(name, "report.json").read_text()) for name in ("killed-tagger", "whole-tagger"))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_plain_tags_and_repaired_ones(run: Run, files: Path) -> None:
    assert run(f"{LM} --out lm --steps 2").code == 0
    text = Path("train.conll").read_text().replace("B-LOC", "I-LOC")
    Path("train.conll").write_text(text)
    result = run(f"{TAGGER} --scheme bio2 --out t --epochs 1 --prune-epochs 1 --json")
    assert document_of(result)["data"]["repaired"] == 60
    assert any("60 of " in line and "ill-formed BIO2" in line for line in result.errors)
    plain = run(f"{TAGGER} --scheme plain --out p --epochs 1 --prune-epochs 1 --json")
    assert document_of(plain)["evaluation"]["before"]["metric"] == "word accuracy"
    assert "I-LOC" in json.loads(Path("p/model/config.json").read_text())["tags"]


BAD_LM = [
    ("nowhere", "data: no such file: 'nowhere'"),
    ("empty", "text: expected at least one word in 'empty'"),
    ("latin", "data: 'latin', line 2: expected UTF-8"),
    ("text --cutoffs 5,3", "cutoffs: expected rising numbers below "),
    ("text --cutoffs 5000", "cutoffs: expected rising numbers below "),
    ("text --layer-dropout 1", "layer_dropout: expected a probability in [0, 1), got 1.0"),
    ("text --learning-rate 0", "learning_rate: expected a number above 0, got 0.0"),
    ("text --min-count 9999", "min_count: expected one that some word reaches, got 9999"),
    (
        "text --width 1 --embedding 1 --layers 1 --cutoffs 3,5",
        "cutoffs: expected fewer for a softmax that reads 2 values, got 2",
    ),
    ("text --seed -1", "Invalid value for '--seed'"),
    ("text --eval empty", "text: expected at least one word in 'empty'"),
    ("text --out no/where", "out: expected an existing parent folder"),
    ("text --device gpu", "device: 'gpu' cannot be used"),
]


@pytest.mark.parametrize(("options", "message"), BAD_LM, ids=[options for options, _ in BAD_LM])
def test_bad_text_is_one_line(run: Run, files: Path, options: str, message: str) -> None:
    Path("empty").write_text("\n")
    Path("latin").write_bytes("a\nfenêtre\n".encode("latin-1"))
    assert_refused(run(f"ldnet train-lm {options if '--out' in options else options + ' --out d'} --steps 2"), message, "d")


BAD_TAGGER = [
    ("--target-column 4", "column: expected a number from 1 to 3, the columns of 'train.conll', got 4"),
    ("--target-column NER", "column: expected a number, as 'train.conll' does not begin with "),
    ("--target-column 2", "data: 'train.conll', line 1: expected O, or B-, I-, E- or S- with a type"),
    ("--data ragged", "data: 'ragged', line 3: expected 3 columns, got 2"),
    ("--eval nowhere", "data: cannot read 'nowhere': No such file or directory"),
    ("--scheme iob", "scheme: expected one of auto, bio1, bio2, bioes, plain, got 'iob'"),
    ("--lambda0 -1", "lambda0: expected at least 0, got -1"),
    ("--regulariser R4", "regulariser: expected R1, R2, R3, got 'R4'"),
    ("--epochs 0", "epochs: expected a number above 0, got 0.0"),
    ("--learning-rate inf", "learning_rate: expected a number above 0, got inf"),
    ("--gate-learning-rate -1", "learning_rate: expected at least 0, got -1"),
    ("--input-column 0", "token: expected a number from 1 to 3, the columns of "),
]


def test_bad_columns_are_one_line(run: Run, files: Path) -> None:
    assert run(f"{LM} --out lm --steps 2").code == 0
    Path("ragged").write_text("a x O\nb x O\nc O\n")
    for options, message in BAD_TAGGER:
        assert_refused(run(f"{TAGGER} --out d {options}"), message, "d")
    assert_refused(run(f"{TAGGER.replace(' lm ', ' text ')} --out d"), "model: expected a folder with config.json", "d")
    assert_refused(run("ldnet tag lm text"), "model: expected the folder of 'tagger', got 'lm' of 'language models'", "d")
    assert run(f"{TAGGER} --out d --epochs 1 --prune-epochs 1").code == 0
    assert_refused(run(f"{TAGGER} --out d --resume --epochs 2 --prune-epochs 1"), "stages: 'd' was begun with ", "n")
    for options, message in (
        ("nowhere", "data: cannot read 'nowhere'"),
        ("text --scheme x", "scheme: expected one of bio1, bio2"),
    ):
        assert_refused(run(f"ldnet tag d {options}"), message, "n")


def test_tagging_stops_at_a_line_that_is_not_text(run: Run, files: Path) -> None:
    assert run(f"{LM} --out lm --steps 2").code == 0
    assert run(f"{TAGGER} --out t --epochs 1 --prune-epochs 1").code == 0
    Path("latin").write_bytes("a\nfenêtre\n".encode("latin-1"))
    result = run("ldnet tag t latin --batch-size 1")
    assert result.code == 2
    assert result.out.startswith("a\t")
    assert result.errors == [
        f"secateur: data: 'latin', line 2: expected UTF-8, got {bytes([0xEA]) + b'tre' + chr(10).encode()!r}"
    ]
    assert run("ldnet tag t latin --json").out == ""
