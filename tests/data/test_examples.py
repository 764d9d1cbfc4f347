"""Examples from files: every format gives the same rows, and unusable files are refused."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch

import secateur
from secateur.data.examples import read_examples

# A comma, a quote, a line break, characters beyond ASCII, an empty text, and a column that is not requested.
ROWS = [
    {"input": "the cat, sat", "target": "yes", "id": "1"},
    {"input": 'a "big"\ntree', "target": "no way", "id": "2"},
    {"input": "größer 東京 🌳", "target": "yes", "id": "3"},
    {"input": "", "target": "maybe so then", "id": "4"},
]
EXPECTED = [{"input": row["input"], "target": row["target"]} for row in ROWS]
FORMATS = ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz"]


def write(path: Path) -> Path:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
        elif kind == "json":
            json.dump(ROWS, file)
        else:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{name}")
    assert read_examples(path, ("input", "target")) == EXPECTED
    assert read_examples(str(path), ("input", "target")) == EXPECTED


def test_a_dataset_is_an_iterable_of_rows() -> None:
    import datasets

    assert read_examples(datasets.Dataset.from_list(ROWS), ("input", "target")) == EXPECTED


def test_a_limit_reads_no_further() -> None:
    def rows() -> Any:
        yield from ROWS[:2]
        raise AssertionError("read too far")

    # The reader may fetch the row at which it stops, but no row after it.
    assert read_examples(ROWS, ("input",), limit=2) == [{"input": row["input"]} for row in ROWS[:2]]
    assert read_examples(rows(), ("input",), limit=1) == [{"input": ROWS[0]["input"]}]


def test_the_callers_rows_are_copied() -> None:
    given = [dict(row) for row in ROWS]
    read_examples(given, ("input", "target"))[0]["input"] = "changed"
    assert given == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"input": "a", "target": "b"}\n{oops', r"a\.jsonl', line 2 is not JSON"),
        ("a.json", b'[{"input": "a"', r"a\.json' cannot be read to its end: it is not JSON"),
        ("a.jsonl", b'{"input": "a", "target": "b"}\n[1]\n', r"row 2: expected an object with 'input', 'target', got list"),
        ("a.jsonl", b'{"input": "a", "target": "b"}\n{"input": "a"}', r"row 2: expected the column 'target', got 'input'"),
        ("a.jsonl", b'{"input": null, "target": "b"}', r"row 1: expected a value in column 'input', got null"),
        ("a.jsonl", b"\xff\xfe\x00", r"expected UTF-8, got UTF-16"),
        ("a.csv", b"input,number\nx,y\n", r"columns: expected the column 'target', got 'input', 'number'; name it"),
        ("a.csv", b"input,target\nx,y\nz\n", r"a\.csv', line 3: expected 2 fields, as in the header, got 1"),
        ("a.csv", b"input,target\n", r"expected at least one example, got none"),
        ("a.jsonl", b"", r"expected at least one example, got none"),
        ("a.parquet", b"PAR1 no", r"a\.parquet' cannot be read to its end: "),
        ("a.jsonl.gz", b"plain text", r"cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"input": "a"}')[:-9], r"cannot be read"),
        ("a.txt", b"x", r"expected a file ending in \.jsonl"),
        ("a.json", b"[", r"is not JSON"),
    ],
    ids=[
        *["line-not-json", "json-cut", "row-not-an-object", "column-missing", "null", "not-utf8", "csv-column-missing"],
        *["csv-row-short", "csv-header-only", "empty", "parquet-damaged", "not-gzip", "gzip-cut", "unknown-ending", "bracket"],
    ],
)
def test_unusable_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(secateur.InputError, match=message):
        read_examples(tmp_path / name, ("input", "target"))


@pytest.mark.parametrize("data", [torch.tensor(0.5), numpy.array(3)])
def test_an_array_of_one_value_is_no_rows(data: Any) -> None:
    with pytest.raises(secateur.InputError, match=r"^examples: expected an iterable of rows or the name of data, got "):
        read_examples(data, ("input",))
