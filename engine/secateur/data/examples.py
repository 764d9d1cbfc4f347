"""Read examples from iterables, from files, from folders of `datasets.save_to_disk`, or from a data set on the Hub."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from secateur.data.columns import Columns, resolve
from secateur.data.formats import (
    COLUMNAR,
    JSON,
    TABLES,
    UNREADABLE,
    ColumnError,
    Record,
    columns_of,
    format_of,
    is_utf8,
    read_blocks,
)
from secateur.support.compat import own_code_options, saved_data_files
from secateur.support.errors import InputError, first_line, reading
from secateur.support.files import require_regular
from secateur.support.hub import require_dataset

Example = dict[str, Any]
Examples = str | Path | Iterable[Mapping[str, Any]]
Reader = Callable[[Sequence[str]], Iterable[Any]]

FORMATS = (*JSON, *TABLES, *COLUMNAR)


class _Read(dict[str, Any]):
    """An example that `read_examples` has made. Its columns have the task's names already."""


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


def read_examples(
    examples: Examples,
    columns: tuple[str, ...],
    *,
    names: Columns | None = None,
    pairs: bool = False,
    limit: int | None = None,
) -> list[Example]:
    """Read examples into a list of dicts that hold exactly `columns`.

    The class numbers of a column whose feature is a `datasets.ClassLabel` become `ClassName`s.

    Args:
        examples: An iterable of mappings (a `datasets.Dataset` is one); a `datasets.DatasetDict` with one split; a pandas or
            polars DataFrame, a pyarrow Table or a dict of columns; the path of a JSONL, JSON, CSV, TSV, Parquet or Arrow file
            (text files may end in .gz or .zst), as `read_blocks` reads it; a folder of one split that `datasets.save_to_disk`
            wrote; "builtin:TASK" or "builtin:TASK.test"; or a Hub name, "owner/name" or "owner/name:split".
        columns: The columns that every row must have.
        names: The columns of the rows that are `columns`, as `resolve` takes them. Common names are found without.
        pairs: Whether an input may be a pair of texts.
        limit: Keep only the first `limit` rows.

    Raises:
        InputError: The data do not exist or have no rows, or a row cannot be read, lacks a column, or has a null or text with
            lone surrogates in it. The message gives the row's number: rows of a file count from 1, without the header of a CSV
            file. Or no column can be one of `columns`, or several can.
    """
    where, present, read = _rows(examples)
    sources = resolve(columns, present, names, pairs=pairs) if present else {column: (column,) for column in columns}
    needed = [name for of_column in sources.values() for name in of_column]
    kept: list[Example] = []
    for number, row in enumerate(read(needed), start=1):
        if limit is not None and len(kept) == limit:
            break
        if isinstance(row, Record):
            if row.reason is not None:
                raise InputError(f"data: {where!r}, {row.reason}")
            row = row.value
        if not isinstance(row, Mapping):
            raise InputError(f"{where}, row {number}: expected an object with {_names(needed)}, got {type(row).__name__}")
        for name in needed:
            if name not in row:
                raise InputError(f"{where}, row {number}: expected the column {name!r}, got {_names(row)}")
            if row[name] is None:
                raise InputError(f"{where}, row {number}: expected a value in column {name!r}, got null")
            if not is_utf8(row[name]):
                raise InputError(f"{where}, row {number}: expected UTF-8 in column {name!r}, got {str(row[name])[:40]!r}")
        kept.append(_Read({column: _value(row, of_column) for column, of_column in sources.items()}))
    if not kept:
        raise InputError(f"{where}: expected at least one example, got none")
    return kept


def _value(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of one column, or the values of several columns as a list."""
    return row[names[0]] if len(names) == 1 else [row[name] for name in names]


def require_text(example: Example, column: str, number: int) -> str:
    """Return the value of a text column.

    Raises:
        InputError: The value is not text. The message gives the row's number.
    """
    value = example[column]
    if not isinstance(value, str):
        raise InputError(f"examples, row {number}: expected text in column {column!r}, got {type(value).__name__} {value!r}")
    return value


def only_split(data: Any, argument: str) -> Any:
    """Return the data set of a `datasets.DatasetDict` with one split; other data as they are.

    Raises:
        InputError: There are several splits. The message begins with `argument` and names them.
    """
    if not isinstance(data, Mapping) or not any(hasattr(split, "column_names") for split in data.values()):
        return data
    first, *others = data
    if others:
        raise InputError(
            f"{argument}: expected one data set, got the splits {_names(data)}: give one of them, as {argument}=data[{first!r}]"
        )
    return data[first]


def rows_in_memory(data: Any, argument: str) -> Iterable[Any]:
    """Return the rows of data in memory: of a pandas DataFrame, a pyarrow Table or a dict of columns, or the data themselves.

    A `datasets.DatasetDict` with one split gives the split's rows.

    Raises:
        InputError: The data are no iterable of rows: one mapping, several splits, bytes, another library's data frame, or no
            iterable at all. The message begins with `argument`.
    """
    data = only_split(data, argument)
    if hasattr(data, "iterrows") and hasattr(data, "columns"):  # pandas, which is not imported for this
        if not data.columns.is_unique:
            raise InputError(f"{argument}: expected columns of different names, got {_names(map(str, data.columns))}")
        present = data.astype(object).where(data.notna(), None)
        data = {name: present[name].tolist() for name in data.columns}
    elif hasattr(data, "to_pylist"):  # pyarrow
        return data.to_pylist()  # type: ignore[no-any-return]
    elif hasattr(data, "iter_rows") and hasattr(data, "schema"):  # polars
        return data.iter_rows(named=True)  # type: ignore[no-any-return]
    if isinstance(data, Mapping):
        return _rows_of_columns(data, argument)
    single = isinstance(data, (bytes, bytearray)) or getattr(data, "ndim", 1) == 0  # Arrays of one value cannot be iterated.
    if not isinstance(data, Iterable) or single or hasattr(data, "columns"):
        raise InputError(f"{argument}: expected an iterable of rows or the name of data, got {type(data).__name__}")
    return data


def _rows_of_columns(data: Mapping[Any, Any], argument: str) -> Iterator[Any]:
    """The rows of a mapping from names to columns."""
    columns = list(data.values())
    lists = all(hasattr(column, "__len__") and not isinstance(column, (str, bytes, Mapping)) for column in columns)
    if not lists or len({len(column) for column in columns}) != 1:
        raise InputError(f"{argument}: expected rows, or columns of one length, got one mapping with {_names(map(str, data))}")
    return (dict(zip(data, row, strict=True)) for row in zip(*columns, strict=True))


def _rows(examples: Examples) -> tuple[str, list[str], Reader]:
    """The name of the data for error messages, their columns (none if unknown), and what reads the given columns of them."""
    if not isinstance(examples, (str, Path)):
        examples = only_split(examples, "examples")
        rows = iter(_with_class_names(rows_in_memory(examples, "examples"), getattr(examples, "features", None)))
        first = list(itertools.islice(rows, 1))
        if first and isinstance(first[0], _Read):
            return "examples", [], lambda _: itertools.chain(first, rows)
        present = [name for name in first[0] if isinstance(name, str)] if first and isinstance(first[0], Mapping) else []
        return "examples", present, lambda _: itertools.chain(first, rows)
    name = str(examples)
    if name.startswith("builtin:"):
        from secateur.data.builtin import examples as builtin_examples

        of_task = builtin_examples(name.removeprefix("builtin:"))
        return name, list(of_task[0]), lambda _: iter(of_task)
    path = Path(name)
    if path.is_dir():
        files = saved_files(path)
        if not files:
            raise InputError(f"data: expected a file, got the folder {name!r}")
        return name, _file_columns(files[0]), partial(_file_rows, files)
    if path.exists():
        require_regular("data", path)
        if format_of(name) not in FORMATS:
            raise InputError(f"data: expected a file ending in {', '.join(FORMATS)}, got {name!r}")
        return name, _file_columns(path), partial(_file_rows, [path])
    if format_of(name) in FORMATS or path.is_absolute() or name.startswith("."):
        raise InputError(f"data: no such file: {name!r}")
    dataset = hub_dataset(name)
    return name, list(dataset.column_names), lambda _: _with_class_names(dataset, dataset.features)


def _file_columns(path: Path) -> list[str]:
    """The columns of a file, none if they are unknown."""
    with _unreadable(path), open(path, "rb") as raw:
        return columns_of(raw, path.name)


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

    return ({**row, **{column: named(row[column], names) for column, names in labels.items() if column in row}} for row in rows)


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


def _file_rows(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[Any]:
    """Iterate over the records of files, or over their values where class numbers have names."""
    for path in paths:
        with _unreadable(path), open(path, "rb") as raw:
            for records, _ in read_blocks(raw, path.name, 0, columns):
                features = None if records.schema is None else _features(records.schema)
                # Only JSON and tables have records with a reason, and they have no features.
                yield from records if features is None else _with_class_names((row.value for row in records), features)


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """A context that reports a file that cannot be read as InputError."""
    try:
        yield
    except ColumnError as error:
        raise InputError(f"{path}: {error}") from None
    except UNREADABLE as error:
        raise InputError(f"data: {str(path)!r} cannot be read to its end: {first_line(error)}") from error


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder that `datasets.save_to_disk` wrote; none of another folder.

    Raises:
        InputError: The folder has several splits, or its list of files is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(state.parent for state in folder.glob("*/state.json"))
        if len(splits) != 1:
            names = _names(split.name for split in splits)
            raise InputError(f"data: expected the folder of one split, got {str(folder)!r} with the splits {names}")
        (folder,) = splits
    if not (folder / "state.json").is_file():
        return []
    with reading("data", folder / "state.json", "does not list the files of a data set"):
        return [folder / name for name in saved_data_files(folder)]


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
    require_dataset(repository)
    try:
        return datasets.load_dataset(
            repository, split=split or "train", streaming=streaming, **own_code_options(datasets.load_dataset)
        )
    except Exception as error:  # The Hub client raises many types of error; all of them mean that the name gives no data.
        raise InputError(f"data: no such file or Hub data set: {name!r} ({first_line(error)})") from error


def _names(columns: Iterable[Any]) -> str:
    """The names in quotation marks, for an error message."""
    return ", ".join(repr(column) for column in columns) or "no columns"
