"""Examples from where users have them: iterables, JSONL, CSV and Parquet files, or a data set on the Hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.support.errors import InputError, first_line, reading

Example = dict[str, Any]
Examples = str | Path | Iterable[Mapping[str, Any]]

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_examples(examples: Examples, columns: tuple[str, ...], *, limit: int | None = None) -> list[Example]:
    """The examples as a list of dicts that hold `columns`.

    examples: an iterable of mappings (a `datasets.Dataset` is one), a path of a JSONL, CSV, TSV or Parquet file (the text
    ones also with .gz), "builtin:TASK" or "builtin:TASK.test", or a Hub name, "owner/name" or "owner/name:split".
    limit: keep the first that many. Raises InputError: nothing there, no rows, a missing column or a null value, with the
    number of the row (files count from 1, the header of a CSV not counted).
    """
    where, rows = _rows(examples)
    found: list[Example] = []
    for number, row in enumerate(rows, start=1):
        if limit is not None and len(found) == limit:
            break
        if not isinstance(row, Mapping):
            raise InputError(f"{where}, row {number}: expected an object with {_names(columns)}, got {type(row).__name__}")
        for column in columns:
            if column not in row:
                raise InputError(f"{where}, row {number}: expected the column {column!r}, got {_names(row)}")
            if row[column] is None:
                raise InputError(f"{where}, row {number}: expected a value in column {column!r}, got null")
        found.append({column: row[column] for column in columns})
    if not found:
        raise InputError(f"{where}: expected at least one example, got none")
    return found


def require_text(example: Example, column: str, number: int) -> str:
    """The value of a text column. Raises InputError with the row's number if it is not text."""
    value = example[column]
    if not isinstance(value, str):
        raise InputError(f"examples, row {number}: expected text in column {column!r}, got {type(value).__name__} {value!r}")
    return value


def _rows(examples: Examples) -> tuple[str, Iterator[Any]]:
    if not isinstance(examples, (str, Path)):
        if not isinstance(examples, Iterable):
            raise InputError(f"examples: expected an iterable of dicts or a path, got {type(examples).__name__}")
        return "examples", iter(examples)
    name = str(examples)
    if name.startswith("builtin:"):
        from secateur.data.builtin import examples as builtin_examples

        return name, iter(builtin_examples(name.removeprefix("builtin:")))
    path = Path(name)
    suffix = Path(name.removesuffix(".gz")).suffix
    if path.is_dir():
        raise InputError(f"data: expected a file, got the folder {name!r}")
    if path.exists():
        return name, _file_rows(path, suffix)
    if suffix in FORMATS or path.is_absolute() or name.startswith("."):
        raise InputError(f"data: no such file: {name!r}")
    return name, iter(hub_dataset(name))


def _file_rows(path: Path, suffix: str) -> Iterator[Any]:
    if suffix == ".parquet":
        import pyarrow.parquet

        with reading("data", path, "is not a readable Parquet file", typed=False):
            table = pyarrow.parquet.read_table(path)
        return iter(table.to_pylist())
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"data: cannot read {str(path)!r} as UTF-8 text: {error}") from error
    if suffix in (".csv", ".tsv"):
        return csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",", restval=None)
    if suffix in (".jsonl", ".json"):
        return _json_rows(path, text)
    raise InputError(f"data: expected a file ending in {', '.join(FORMATS)}, got {str(path)!r}")


def _json_rows(path: Path, text: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        with reading("data", path, "is not JSON", typed=False):
            rows = json.loads(text)
        yield from rows
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"data: {str(path)!r}, line {number} is not JSON: {error}") from error


def hub_dataset(name: str, *, streaming: bool = False) -> Any:
    """A data set on the Hub, "owner/name" or "owner/name:split". Raises InputError if there is none."""
    import datasets

    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train", streaming=streaming)
    except Exception as error:  # The Hub client raises many kinds; each means that this name gives no data.
        raise InputError(f"data: no such file or Hub data set: {name!r} ({first_line(error)})") from error


def _names(columns: Iterable[str]) -> str:
    return ", ".join(repr(column) for column in columns) or "no columns"
