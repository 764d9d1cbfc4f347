"""Read examples from iterables, from JSONL, CSV, TSV and Parquet files, or from a data set on the Hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.support.compat import own_code_options
from secateur.support.errors import InputError, first_line, reading
from secateur.support.files import require_regular

Example = dict[str, Any]
Examples = str | Path | Iterable[Mapping[str, Any]]

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class ClassName(str):
    """The name that a data set gives a class number: the value of a column whose feature is a `datasets.ClassLabel`.

    Attributes:
        number: The number in the data set, which may stand for another class in a model.
        names: The names of all classes of the column, in the order of their numbers.
    """

    number: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, number: int, names: Sequence[str]) -> ClassName:
        """Return the name of a class number."""
        name = cls(names[number])
        name.number, name.names = number, tuple(names)
        return name


def read_examples(examples: Examples, columns: tuple[str, ...], *, limit: int | None = None) -> list[Example]:
    """Read examples into a list of dicts that hold exactly `columns`.

    The class numbers of a column whose feature is a `datasets.ClassLabel` become `ClassName`s.

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
        return "examples", _with_class_names(examples, getattr(examples, "features", None))
    name = str(examples)
    if name.startswith("builtin:"):
        from secateur.data.builtin import examples as builtin_examples

        return name, iter(builtin_examples(name.removeprefix("builtin:")))
    path = Path(name)
    suffix = Path(name.removesuffix(".gz")).suffix
    if path.is_dir():
        raise InputError(f"data: expected a file, got the folder {name!r}")
    if path.exists():
        require_regular("data", path)
        return name, _file_rows(path, suffix)
    if suffix in FORMATS or path.is_absolute() or name.startswith("."):
        raise InputError(f"data: no such file: {name!r}")
    dataset = hub_dataset(name)
    return name, _with_class_names(dataset, dataset.features)


def _with_class_names(rows: Iterable[Any], features: Any) -> Iterator[Any]:
    """Iterate over rows, with names in place of the class numbers of a data set's ClassLabels. Other numbers stay."""
    by_column = features.items() if isinstance(features, Mapping) else ()
    labels = {column: names for column, feature in by_column if (names := _names_of_classes(feature))}
    if not labels:
        return iter(rows)

    def named(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, (list, tuple)) or (hasattr(value, "ndim") and value.ndim):
            return [named(element, names) for element in value]
        is_class = value is not None and not isinstance(value, str) and 0 <= value < len(names)
        return ClassName.of(int(value), names) if is_class else value

    return ({**row, **{column: named(row[column], names) for column, names in labels.items()}} for row in rows)


def _names_of_classes(feature: Any) -> list[str] | None:
    """The class names of a ClassLabel, or of a list of them, None for another feature."""
    from datasets import ClassLabel

    if isinstance(feature, list) and len(feature) == 1:
        return _names_of_classes(feature[0])
    inner = feature if isinstance(feature, ClassLabel) else getattr(feature, "feature", None)
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def _features(schema: Any) -> Any:
    """The features that `datasets` has written into a Parquet file's schema, None without any."""
    if b"huggingface" not in (schema.metadata or {}):
        return None
    from datasets import Features

    return Features.from_arrow_schema(schema)


def _file_rows(path: Path, suffix: str) -> Iterator[Any]:
    """Iterate over the rows of a file whose format is `suffix`."""
    if suffix == ".parquet":
        import pyarrow.parquet

        with reading("data", path, "is not a readable Parquet file", typed=False):
            table = pyarrow.parquet.read_table(path)
            features = _features(table.schema)
        return _with_class_names(table.to_pylist(), features)
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
        return datasets.load_dataset(
            repository, split=split or "train", streaming=streaming, **own_code_options(datasets.load_dataset)
        )
    except Exception as error:  # The Hub client raises many types of error; all of them mean that the name gives no data.
        raise InputError(f"data: no such file or Hub data set: {name!r} ({first_line(error)})") from error


def _names(columns: Iterable[str]) -> str:
    """The names in quotation marks, for an error message."""
    return ", ".join(repr(column) for column in columns) or "no columns"
