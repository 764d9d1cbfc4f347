"""Corpora in all formats, for the tests of bulk scoring."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from cases import sentences

Writer = Callable[[Path, Sequence[str]], Path]


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of one word to a few dozen words."""
    words = " ".join(sentences(count * 4, seed=seed)).split()
    return [" ".join(words[k * 3 : k * 3 + 1 + (k * 7919 + seed) % 30]) for k in range(count)]


def parquet(folder: Path, of: Sequence[str]) -> Path:
    table = pyarrow.table({"id": list(range(len(of))), "text": of})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    return folder / "a.parquet"


def arrow(folder: Path, of: Sequence[str]) -> Path:
    datasets.Dataset.from_dict({"id": list(range(len(of))), "text": list(of)}).save_to_disk(folder / "saved")
    return folder / "saved"


def json_lines(folder: Path, of: Sequence[str], name: str = "a.jsonl") -> Path:
    return write(folder / name, "".join(json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(of)).encode())


def table(folder: Path, of: Sequence[str], name: str = "a.csv", delimiter: str = ",") -> Path:
    with open(folder / "plain", "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("id", "text"), *enumerate(of)])
    return write(folder / name, (folder / "plain").read_bytes())


def lines(folder: Path, of: Sequence[str], name: str = "a.txt") -> Path:
    return write(folder / name, "".join(f"{text}\n" for text in of).encode())


def write(path: Path, content: bytes) -> Path:
    """The content, compressed as the ending of the name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


FORMATS: dict[str, Writer] = {
    "parquet": parquet,
    "arrow": arrow,
    "jsonl": json_lines,
    "jsonl.gz": lambda folder, of: json_lines(folder, of, "a.jsonl.gz"),
    "jsonl.zst": lambda folder, of: json_lines(folder, of, "a.jsonl.zst"),
    "csv": table,
    "csv.gz": lambda folder, of: table(folder, of, "a.csv.gz"),
    "tsv": lambda folder, of: table(folder, of, "a.tsv", "\t"),
    "txt": lines,
    "txt.zst": lambda folder, of: lines(folder, of, "a.txt.zst"),
}


def read(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The scored rows of every shard, by the shard's path."""
    paths = sorted((out / "shards").rglob("*.parquet"))
    return {path.relative_to(out / "shards").as_posix(): pyarrow.parquet.read_table(path).to_pylist() for path in paths}


def rejects(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The rejected rows of every shard, by the shard's path."""
    paths = sorted((out / "rejects").rglob("*.jsonl"))
    return {
        path.relative_to(out / "rejects").as_posix(): [json.loads(line) for line in path.read_text().splitlines()]
        for path in paths
    }
