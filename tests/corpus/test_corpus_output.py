"""The scores may be Parquet, JSONL or CSV, several columns may be carried over, and the summary counts the labels."""

from __future__ import annotations

import collections
import csv
import datetime
import json
from pathlib import Path
from typing import Any

import corpora
import pyarrow
import pyarrow.parquet
import pytest
from cases import CASES
from command import Run

import secateur

CASE = CASES["bert-sequence"]
LINE = "score m --threads 1 --max-tokens 256 --dtype float32 --compile off --engine-runtime torch"


@pytest.fixture
def started(run: Run, tmp_path: Path) -> Run:
    """`run`, in a folder with the model "m" and the data "a.parquet", of which row 3 is empty."""
    secateur.save(CASE.model(), "m", tokenizer=CASE.task.reader)
    texts = corpora.texts(12)
    texts[3] = ""
    table = {
        "text": texts,
        "id": list(range(100, 112)),
        "title": [f'a "title", {k}\nof two lines é' for k in range(12)],
        "date": [datetime.date(2024, 1, 1 + k) for k in range(12)],
        "tags": [["x", "y"]] * 12,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    return run


def read(path: str) -> list[dict[str, Any]]:
    if path.endswith(".jsonl"):
        return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_other_formats_have_the_rows_of_parquet(started: Run, format: str) -> None:
    line = f"{LINE} --data a.parquet --keep-columns id,title,date,tags"
    for name in ("parquet", format):
        result = started(f"{line} --format {name} --out {name} --json")
        assert (result.code, result.document["scored"], result.document["rejected"]) == (0, 11, 1)
    expected = pyarrow.parquet.read_table("parquet/shards/a.parquet").to_pylist()
    rows = read(f"{format}/shards/a.{format}")
    assert list(rows[0]) == list(expected[0])
    assert [*expected[0]][:5] == ["row", "id", "title", "date", "tags"]
    for row, same in zip(rows, expected, strict=True):
        for name, value in same.items():
            written = json.loads(row[name]) if format == "csv" and name == "tags" else row[name]
            if isinstance(value, float):
                assert float(written) == value
            else:
                assert str(written) == str(value)
    rejects = read(f"{format}/rejects/a.jsonl")
    assert rejects == [
        {
            "row": 3, "id": 103, "title": 'a "title", 3\nof two lines é', "date": "2024-01-04", "tags": ["x", "y"],
            "reason": "empty",
        }
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_other_formats_are_resumed_and_checked(started: Run, format: str) -> None:
    line = f"{LINE} --data a.parquet --format {format} --out out --json"
    assert started(line).code == 0
    path = Path(f"out/shards/a.{format}")
    before, content = path.stat().st_mtime_ns, path.read_bytes()
    assert started(f"{line} --resume").document["rows"] == 12
    assert path.stat().st_mtime_ns == before
    for damaged in (content[:-5], content.replace(b"0", b"1", 1)):
        path.write_bytes(damaged)
        result = started(f"{line} --resume")
        assert any("is damaged, its shard is scored again" in said for said in result.errors)
        assert path.read_bytes() == content
    Path("out/finished/a.json").unlink()
    assert started(f"{line} --resume").document["rows"] == 12
    other = started(f"{LINE} --data a.parquet --out out --resume")
    assert (other.code, other.errors[-1][:35]) == (2, "secateur: format: 'out' was begun w")


def test_the_summary_counts_labels(started: Run) -> None:
    result = started(f"{LINE} --data a.parquet --out out --part-rows 4 --json")
    labels = [row["label"] for row in pyarrow.parquet.read_table("out/shards/a.parquet").to_pylist()]
    counted = collections.Counter(labels)
    assert {name: count for name, count in result.document["labels"].items() if count} == counted
    assert sum(result.document["labels"].values()) == 11
    again = started(f"{LINE} --data a.parquet --out out --part-rows 4 --resume")
    assert f"label {labels[0]}" in again.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--format xml", "format: expected parquet, jsonl, csv, got 'xml'"),
        ("--keep-columns id --id-column id", "keep-columns: expected either it or --id-column"),
        ("--keep-columns id,,date", "keep-columns: expected names between commas, got 'id,,date'"),
        ("--keep-columns id,id", "keep-columns: expected each column once, got 'id' 2 times"),
        ("--keep-columns id,label", "keep-columns: expected another name than those of the scores"),
        ("--keep-columns id,nothing", "data: "),
    ],
)
def test_unusable_options_are_refused(started: Run, options: str, said: str) -> None:
    result = started(f"{LINE} --data a.parquet --out out {options}")
    assert (result.code, result.errors[-1].startswith(f"secateur: {said}")) == (2, True), result.errors
    assert not Path("out").exists()


def test_columns_of_json_have_types_of_their_own(started: Run, tmp_path: Path) -> None:
    rows = [{"text": "some words", "id": k if k != 270 else "n", "note": str(k)} for k in range(300)]
    corpora.write(tmp_path / "b.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert started(f"{LINE} --data b.jsonl --keep-columns id,note --out out").code == 0
    table = pyarrow.parquet.read_table("out/shards/b.jsonl.parquet")
    assert [str(table.schema.field(name).type) for name in ("id", "note")] == ["int64", "string"]
    (reject,) = read("out/rejects/b.jsonl.jsonl")
    assert reject == {"row": 270, "id": "n", "note": "270", "reason": "id: expected int64, as in the first rows, got str"}
