"""Writers of small corpora in all formats, and readers of scored shards, for the tests of bulk scoring."""

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
    """Return texts of one word to a few dozen words."""
    words = " ".join(sentences(count * 4, seed=seed)).split()
    return [" ".join(words[k * 3 : k * 3 + 1 + (k * 7919 + seed) % 30]) for k in range(count)]


def parquet(folder: Path, texts: Sequence[str]) -> Path:
    """Write a Parquet file with several row groups."""
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    return folder / "a.parquet"


def arrow(folder: Path, texts: Sequence[str]) -> Path:
    """Write a folder as `Dataset.save_to_disk` does."""
    datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": list(texts)}).save_to_disk(folder / "saved")
    return folder / "saved"


def json_lines(folder: Path, texts: Sequence[str], name: str = "a.jsonl") -> Path:
    """Write a JSONL file, compressed if the name says so."""
    return write(folder / name, "".join(json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(texts)).encode())


def table(folder: Path, texts: Sequence[str], name: str = "a.csv", delimiter: str = ",") -> Path:
    """Write a CSV file, with another delimiter or compressed if asked for."""
    with open(folder / "plain", "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("id", "text"), *enumerate(texts)])
    return write(folder / name, (folder / "plain").read_bytes())


def lines(folder: Path, texts: Sequence[str], name: str = "a.txt") -> Path:
    """Write a text file with one text a line, compressed if the name says so."""
    return write(folder / name, "".join(f"{text}\n" for text in texts).encode())


def write(path: Path, content: bytes) -> Path:
    """Write the content, compressed if the name ends in .gz or .zst. Return the path."""
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
    "jsonl.gz": lambda folder, texts: json_lines(folder, texts, "a.jsonl.gz"),
    "jsonl.zst": lambda folder, texts: json_lines(folder, texts, "a.jsonl.zst"),
    "csv": table,
    "csv.gz": lambda folder, texts: table(folder, texts, "a.csv.gz"),
    "tsv": lambda folder, texts: table(folder, texts, "a.tsv", "\t"),
    "txt": lines,
    "txt.zst": lambda folder, texts: lines(folder, texts, "a.txt.zst"),
}


def read(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the scored rows of all shards, by the shard's path."""
    paths = sorted((out / "shards").rglob("*.parquet"))
    return {path.relative_to(out / "shards").as_posix(): pyarrow.parquet.read_table(path).to_pylist() for path in paths}


def rejects(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rejected rows of all shards, by the shard's path."""
    paths = sorted((out / "rejects").rglob("*.jsonl"))
    return {
        path.relative_to(out / "rejects").as_posix(): [json.loads(line) for line in path.read_text().splitlines()]
        for path in paths
    }
