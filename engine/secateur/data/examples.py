"""Read examples from iterables, from JSONL, CSV, TSV and Parquet files, or from a data set on the Hub."""

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
    """Read examples into a list of dicts that hold exactly `columns`.

    Args:
        examples: An iterable of mappings (a `datasets.Dataset` is one), the path of a JSONL, CSV, TSV or Parquet file (text
            files may end in .gz), "builtin:TASK" or "builtin:TASK.test", or a Hub name, "owner/name" or "owner/name:split".
        columns: The columns that every row must have.
        limit: Keep only the first `limit` rows.

    Raises:
        InputError: The data do not exist or have no rows, or a row lacks a column or has a null in it. The message gives the
            row's number: rows of a file count from 1, without the header of a CSV file.
    """
    where, rows = _rows(examples)
    kept: list[Example] = []
    for number, row in enumerate(rows, start=1):
        if limit is not None and len(kept) == limit:
            break
        if not isinstance(row, Mapping):
            raise InputError(f"{where}, row {number}: expected an object with {_names(columns)}, got {type(row).__name__}")
        for column in columns:
            if column not in row:
                raise InputError(f"{where}, row {number}: expected the column {column!r}, got {_names(row)}")
            if row[column] is None:
                raise InputError(f"{where}, row {number}: expected a value in column {column!r}, got null")
        kept.append({column: row[column] for column in columns})
    if not kept:
        raise InputError(f"{where}: expected at least one example, got none")
    return kept


def require_text(example: Example, column: str, number: int) -> str:
    """Return the value of a text column.

    Raises:
        InputError: The value is not text. The message gives the row's number.
    """
    value = example[column]
    if not isinstance(value, str):
        raise InputError(f"examples, row {number}: expected text in column {column!r}, got {type(value).__name__} {value!r}")
    return value


def _rows(examples: Examples) -> tuple[str, Iterator[Any]]:
    """The name of the data for error messages, and an iterator over their rows."""
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
    """Iterate over the rows of a file whose format is `suffix`."""
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
    """Iterate over the rows of JSONL, or of one JSON array."""
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
    """Load a data set from the Hub.

    Args:
        name: "owner/name", or "owner/name:split"; the split is "train" by default.
        streaming: Read the rows while they are used, instead of downloading all of them first.

    Raises:
        InputError: There is no such data set.
    """
    import datasets

    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train", streaming=streaming)
    except Exception as error:  # The Hub client raises many types of error; all of them mean that the name gives no data.
        raise InputError(f"data: no such file or Hub data set: {name!r} ({first_line(error)})") from error


def _names(columns: Iterable[str]) -> str:
    """The names in quotation marks, for an error message."""
    return ", ".join(repr(column) for column in columns) or "no columns"
