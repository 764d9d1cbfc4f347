"""The columns of a user's rows that are a task's columns: given, found by their common names, or refused."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pandas
import polars
import pyarrow
import pyarrow.parquet
import pytest

from secateur.data.columns import resolve
from secateur.data.examples import read_examples
from secateur.support.errors import InputError

BOTH = ("input", "target")
ROWS = [{"text": "a b", "label": "x", "id": 1}, {"text": "c", "label": "y", "id": 2}]
EXAMPLES = [{"input": "a b", "target": "x"}, {"input": "c", "target": "y"}]


def test_a_column_with_the_task_s_own_name_comes_first() -> None:
    assert resolve(BOTH, ["text", "label", "target", "input"]) == {"input": ("input",), "target": ("target",)}


def test_given_columns_come_before_all_others() -> None:
    given = {"input": "body", "target": "kind"}
    assert resolve(BOTH, ["input", "target", "body", "kind"], given) == {"input": ("body",), "target": ("kind",)}
    assert resolve(BOTH, ["a", "b", "label"], {"input": "a, b"}) == {"input": ("a", "b"), "target": ("label",)}
    assert resolve(BOTH, ["a", "b", "label"], {"input": ["b", "a"]})["input"] == ("b", "a")


def test_two_texts_are_found_for_tasks_that_take_pairs() -> None:
    present = ["premise", "hypothesis", "label"]
    assert resolve(BOTH, present, pairs=True)["input"] == ("premise", "hypothesis")
    with pytest.raises(InputError, match=r"^columns: expected the column 'input', got 'premise', 'hypothesis', 'label'; name"):
        resolve(BOTH, present)
    # Of the columns of QNLI one alone has a common name too.
    assert resolve(BOTH, ["question", "sentence", "label"], pairs=True)["input"] == ("question", "sentence")


@pytest.mark.parametrize(
    ("roles", "present", "found"),
    [
        (("tokens", "tags"), ["id", "tokens", "ner_tags"], {"tokens": ("tokens",), "tags": ("ner_tags",)}),
        (("image", "target"), ["img", "label"], {"image": ("img",), "target": ("label",)}),
        (("input",), ["sentence", "label"], {"input": ("sentence",)}),
    ],
)
def test_each_kind_of_task_has_common_names(roles: tuple[str, ...], present: list[str], found: dict[str, Any]) -> None:
    assert resolve(roles, present) == found


@pytest.mark.parametrize(
    ("present", "given", "message"),
    [
        (
            ["text", "review", "label"],
            None,
            "columns: expected one column that can be the input, got 'text', 'review'; name",
        ),
        (["tokens", "x"], None, "columns: expected the column 'input', got 'tokens', 'x'; name it: --input-column, in Python"),
        (["text", "x"], None, "columns: expected the column 'target', got 'text', 'x'; name it: --target-column, in Python"),
        (["text", "x"], {"target": "y"}, "columns: expected some of 'text', 'x' for the target, got 'y'"),
        (["text", "x"], {"tags": "x"}, "columns: expected names for 'input', 'target', got one for 'tags'"),
        (["text", "x"], {"target": 3}, "columns: expected a name or several for the target, got 3"),
        (["text", "x"], {"target": ""}, "columns: expected a name or several for the target, got ''"),
        (["text", "x"], {"input": []}, r"columns: expected a name or several for the input, got \[\]"),
        (["text", "x"], "text", "columns: expected names by 'input', 'target', got 'text'"),
    ],
)
def test_wrong_columns_are_refused(present: list[str], given: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        resolve(BOTH, present, given)


def test_what_was_found_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "secateur"):
        for _ in range(2):
            resolve(BOTH, ["utterance", "intent"])
    assert caplog.messages == ["columns: the input is 'utterance', the target is 'intent'"]


def write(path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_files_of_each_format(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert read_examples(tmp_path / name, BOTH) == EXAMPLES
    numbers = [1, 2] if name not in ("a.csv", "a.tsv") else ["1", "2"]
    named = read_examples(tmp_path / name, BOTH, names={"input": ["text", "label"], "target": "id"})
    assert named == [{"input": ["a b", "x"], "target": numbers[0]}, {"input": ["c", "y"], "target": numbers[1]}]


def test_data_in_memory_and_saved_data_sets(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved")
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    forms: list[Any] = [
        ROWS, iter(ROWS), data, pandas.DataFrame(ROWS), pyarrow.Table.from_pylist(ROWS), columns, tmp_path / "saved",
        polars.DataFrame(ROWS),
    ]  # fmt: skip
    for form in forms:
        assert read_examples(form, BOTH) == EXAMPLES, type(form)


def test_class_names_follow_the_column() -> None:
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": labels})
    data = datasets.Dataset.from_list([{"sentence": "a", "label": 1}], features=features)
    (example,) = read_examples(data, BOTH)
    assert example == {"input": "a", "target": "yes"}
    assert example["target"].names == ("no", "yes")
