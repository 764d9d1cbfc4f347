"""Column files as data of commands for a tagger: the same results as JSONL, reported repairs, and errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cases import TAGS
from command import Run
from tagged import CASE, saved, written
from torch import nn

from secateur.data.conll import convert

QUICK = "--batch-sizes 1 --lengths 8"


@pytest.fixture
def tagger(run: Run) -> Run:
    """Runs commands in a folder with a tagger, and its examples as files."""
    saved(CASE.model())
    rows = [{"tokens": row["tokens"], "tags": convert(row["tags"], "bio2", "bio2")[0]} for row in CASE.examples]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written("rows.txt", rows)
    return run


@pytest.mark.parametrize(
    "line",
    [
        "attribute m --data {} --out o",
        "prune m --data {} --eval {} --keep 0.5 --recover none --allocation uniform --align 1 --out o " + QUICK,
        "sweep m --data {} --eval {} --keeps 0.5 --batch-size 1 --length 8 --out o",
        "layers m --data {} --eval {} --keep-layers 1 --out o " + QUICK,
        "evaluate m --data {}",
    ],
    ids=lambda line: line.split()[0],
)
def test_a_column_file_gives_the_same_results_as_jsonl(tagger: Run, line: str) -> None:
    documents = []
    for number, (data, options) in enumerate((("rows.jsonl", ""), ("rows.txt", "--target-column 3 --input-column 2"))):
        result = tagger(f"{line.format(data, data)} {options} --json".replace("--out o", f"--out o{number}"))
        assert result.code == 0, result.errors
        documents.append(untimed(result.document))
    assert documents[0] == documents[1]


def untimed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A command's document without its paths and times."""
    kept = {
        name: value
        for name, value in document.items()
        if name not in ("out", "benchmark", "candidates", "points", "data", "eval")
    }
    if "points" in document:
        kept["points"] = [(point["keep"], point["value"], point["parameters"]) for point in document["points"]]
    return kept


def test_ill_formed_tags_are_repaired_and_reported(tagger: Run) -> None:
    rows = [
        {"tokens": ["the", "cat", "sat"], "tags": ["B-PER", "I-PER", "O"]},
        {"tokens": ["a", "bird"], "tags": ["O", "B-PER"]},
    ]
    written("whole.conll", rows)
    written("broken.conll", [rows[0], {**rows[1], "tags": ["O", "I-PER"]}])
    results = [
        tagger(f"evaluate m --data {name}.conll --target-column 3 --input-column 2 --json") for name in ("whole", "broken")
    ]
    assert results[0].document == results[1].document
    assert results[1].errors == ["broken.conll: 1 of 5 tags were ill-formed BIO2 and repaired"]
    assert results[0].errors == []


@pytest.mark.parametrize(
    ("labels", "written_as"),
    [
        (["O", "B-x", "I-x", "E-x", "S-x"], {"B-PER": "B-x", "I-PER": "I-x"}),
        (["NN", "VB", "DT"], {"O": "NN", "B-PER": "VB", "I-PER": "DT"}),
    ],
    ids=["bioes", "no spans"],
)
def test_the_models_labels_decide_the_scheme(run: Run, labels: list[str], written_as: dict[str, str]) -> None:
    model = CASE.model()
    model.classifier = nn.Linear(model.config.hidden_size, len(labels))  # type: ignore[arg-type, union-attr]
    model.config.id2label = dict(enumerate(labels))  # type: ignore[union-attr]
    model.config.label2id = {name: number for number, name in enumerate(labels)}  # type: ignore[union-attr]
    model.num_labels = len(labels)  # type: ignore[assignment]
    saved(model)
    written("rows.txt", [{"tokens": ["a", "cat", "sat"], "tags": ["O", "B-PER", "I-PER"]}] * 2, written_as)
    result = run("evaluate m --data rows.txt --target-column 3 --input-column 2 --json")
    assert result.code == 0, result.errors
    assert result.document["metric"] == ("F1" if "O" in labels else "word accuracy")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "the B-PER\n\na B-ORG\n",
            "--target-column 2",
            f"data: 'd.conll', line 3: expected a target among the labels {TAGS[0]!r}",
        ),
        (
            "the B-PER\ncat frob\n",
            "--target-column 2",
            "data: 'd.conll', line 2: expected O, or B-, I-, E- or S- with a type, got 'frob'",
        ),
        ("the B-PER\ncat\n", "--target-column 2", "data: 'd.conll', line 2: expected 2 columns, got 1"),
        ("the O\n", "--target-column 3", "column: expected a number from 1 to 2, the columns of 'd.conll', got 3"),
        ("the O\n", "--target-column 2 --input-column x", "token: expected a number, as 'd.conll' does not begin with"),
        ("the O\n", "", "target-column: expected the column of the tags, as 'd.conll' is a column file, got none"),
    ],
)
def test_errors_name_the_line(tagger: Run, text: str, options: str, message: str) -> None:
    Path("d.conll").write_text(text)
    result = tagger(f"prune m --data d.conll --keep 0.5 --out o {options}")
    assert result.code == 2
    assert result.errors[-1].startswith(f"secateur: {message}")
    assert not Path("o").exists()


def test_other_tasks_read_no_column_files(run: Run) -> None:
    Path("d.conll").write_text("the O\n")
    result = run("evaluate builtin --data d.conll --target-column 2")
    assert result.code == 2
    expected = "data: expected a model for token-classification with the column file 'd.conll', got one for text-to-text"
    assert result.errors[-1] == f"secateur: {expected}"
