"""The shards of a corpus, local or remote, in any of the formats, as streams of rows."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.data import formats
from secateur.data.examples import hub_dataset, saved_files
from secateur.data.formats import COMPRESSED, UNREADABLE, Record, Records, RowRange, columns_of, format_of, is_utf8, read_blocks
from secateur.support.errors import InputError, first_line, reading
from secateur.support.urls import redacted

FORMATS = (*formats.COLUMNAR, *formats.JSON, *formats.TABLES, *formats.TEXT)


class ShardError(Exception):
    """A shard cannot be read to its end, or its scores cannot be written. The other shards are not affected.

    Passwords in URLs are hidden in the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class ColumnError(ShardError):
    """A shard lacks a column that was requested."""


@dataclass(frozen=True)
class Row:
    """The values of a row in the requested columns.

    Attributes:
        value: The value to score.
        kept: The values of the columns that are carried over.
        reason: Why there is no value to score, where this is already known.
    """

    value: Any
    kept: tuple[Any, ...] = ()
    reason: str | None = None


class Rows(list[Row]):
    """Rows in order.

    Attributes:
        kept_types: The Arrow types of the columns that are carried over.
    """

    kept_types: tuple[Any, ...] = ()


Identity = str | Sequence[str] | None


def column_names(columns: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of columns, of which none, one (a text) or several are given."""
    return () if columns is None else (columns,) if isinstance(columns, str) else tuple(columns)


@dataclass(frozen=True)
class Part:
    """What a shard is of a file that is cut into several shards.

    Attributes:
        of: The name that the file has as one shard.
        index: Its position among the file's parts, from 0.
        count: The number of the file's parts.
        rows: Its rows.
        file_size: The bytes of the file.
    """

    of: str
    index: int
    count: int
    rows: RowRange
    file_size: int


@dataclass(frozen=True)
class Source:
    """A shard.

    Attributes:
        name: The name of its output: a relative path without the output's suffix.
        place: Its path or URL.
        size: Bytes (about, of a part of a Parquet file), or rows where there are no bytes to count.
        rows: The rows themselves, where the shard is not a file.
        stamp: A text that changes when the file changes: its time of change, or an object store's tag; empty if none is known.
        part: What it is of its file; None if it is the whole file.
    """

    name: str
    place: str
    size: int
    rows: Any = None
    stamp: str = ""
    part: Part | None = None

    @property
    def first(self) -> int:
        """The position of its first row in its file."""
        return 0 if self.part is None else self.part.rows.first

    @property
    def file_name(self) -> str:
        """The name of its file as one shard."""
        return self.name if self.part is None else self.part.of

    @property
    def file_size(self) -> int:
        """The size of its file."""
        return self.size if self.part is None else self.part.file_size

    def read(
        self, column: str | Sequence[str], identity: Identity = None, chunk: int = formats.ROWS
    ) -> Iterator[tuple[Rows, float]]:
        """Read the rows in order.

        A row's value is text where the file says so; other code decides whether it can be scored. In text that is not UTF-8,
        lone surrogates stand for the invalid bytes. All identities of a file have one type, see `_Identities`.

        Args:
            column: The column of the input, or the columns of its texts.
            identity: The columns to carry over.
            chunk: The most rows to yield at a time.

        Yields:
            Rows, and the share of the shard that has been read.

        Raises:
            ShardError: The file is missing, truncated or corrupt, or lacks a column, or Parquet cannot keep the identities.
        """
        names = column_names(identity)
        inputs, identities = column_names(column), [_Identities(names, k) for k in range(len(names))]
        columns = [*inputs, *names]
        try:
            if names and self.part is not None:
                records, _ = next(replace(self, size=0, part=None)._blocks(columns, chunk))
                _of_one_type(records, inputs, names, identities)
            for records, share in self._blocks(columns, chunk):
                yield _of_one_type(records, inputs, names, identities), share
        except formats.ColumnError as error:
            raise ColumnError(f"{self.place}: {error}") from None
        except FileNotFoundError as error:
            raise ShardError(f"{self.place}: no such file") from error
        except UNREADABLE as error:
            raise ShardError(f"{self.place}: cannot be read to its end: {first_line(error)}") from error

    def columns(self) -> list[str]:
        """Return the columns of the shard; none for text, and where they cannot be read."""
        if self.rows is not None:
            first = next(iter(self.rows), None)
            return list(first) if isinstance(first, Mapping) else []
        import fsspec

        try:
            with fsspec.open(self.place, "rb") as raw:
                return [] if format_of(self.place) in formats.TEXT else columns_of(raw, self.place)
        except UNREADABLE:
            return []  # The shard fails when it is scored, and the message says why.

    def _blocks(self, columns: list[str], chunk: int) -> Iterator[formats.Block]:
        """Blocks of records, with the share of the shard that is read."""
        if self.rows is None:
            import fsspec

            with fsspec.open(self.place, "rb") as raw:
                only = None if self.part is None else self.part.rows
                yield from read_blocks(raw, self.place, self.size, columns, chunk, only)
            return
        block, read = formats.Records(), 0
        for read, row in enumerate(self.rows, start=1):
            block.append(Record(row))
            if len(block) == chunk:
                yield block, min(read / self.size, 1.0) if self.size else 0.0
                block = formats.Records()
        yield block, 1.0


def find_sources(data: str) -> list[Source]:
    """Return the shards that `data` names, sorted by name.

    Args:
        data: A file, whatever its name; a pattern, or several files and patterns between commas, local or at any URL that
            fsspec knows (s3://, gs://, hf://, https://, ...); a folder written by `datasets.save_to_disk`; "builtin:TASK"; or
            the name of a data set on the Hub, "owner/name" or "owner/name:split". Files are Parquet, Arrow, JSONL, CSV, TSV, or
            text with a document on each line. All but the first two may be compressed, as .gz or .zst.

    Raises:
        InputError: There are no such files, a format is unknown, or the outputs of two shards would have the same name.
    """
    parts = [data] if Path(data).is_file() else [part.strip() for part in data.split(",")]
    sources = [source for part in parts for source in _named(part)]
    names: dict[str, str] = {}
    for source in sources:
        other = names.setdefault(source.name, source.place)
        if other is not source.place:
            raise InputError(f"data: {other!r} and {source.place!r} would both be scored into {source.name!r}")
    return sorted(sources, key=lambda source: source.name)


def _named(data: str) -> list[Source]:
    """The shards of one name in `data`."""
    if data.startswith("builtin:"):
        from secateur.data import builtin

        rows = builtin.examples(data.removeprefix("builtin:"))
        return [Source(data.removeprefix("builtin:"), data, len(rows), rows)]
    if Path(data).is_dir():
        return _folder(Path(data))
    sources = _files(data)
    if sources:
        return sources
    pattern = any(mark in data for mark in "*?[")
    if pattern or "://" in data or format_of(data) in FORMATS or Path(data).is_absolute() or data.startswith("."):
        raise InputError(f"data: no such file{'s' if pattern else ''}: {data!r}")
    return _hub(data)


def _files(data: str) -> list[Source]:
    """The shards of a file, a pattern or a URL; none if no file matches."""
    import fsspec

    try:
        system, pattern = fsspec.core.url_to_fs(data)
        exact = Path(data).is_file()  # A file's name may have commas and the marks of patterns.
        listed = {pattern: system.info(pattern)} if exact else system.glob(pattern, detail=True)
        details = {path: info for path, info in listed.items() if info["type"] == "file"}
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"data: {data!r} cannot be listed: {first_line(error)}") from error
    for path in details:
        if format_of(path) not in FORMATS:
            known = ", ".join(FORMATS)
            raise InputError(f"data: expected files ending in {known}, text also in {' or '.join(COMPRESSED)}, got {path!r}")
    # Names are relative to the folder before the first wildcard, so that the output has the same folders below it.
    marks = "" if exact else "*?["
    fixed = pattern[: min((pattern.index(mark) for mark in marks if mark in pattern), default=len(pattern))]
    base = fixed.rpartition("/")[0]
    return [
        Source(
            redacted(path.removeprefix(base).lstrip("/").removesuffix(".parquet")), system.unstrip_protocol(path),
            info["size"] or 0, stamp=_stamp(info),
        )
        for path, info in details.items()
    ]  # fmt: skip


def _stamp(info: Mapping[str, Any]) -> str:
    """A text that changes when the file changes, from fsspec's description of the file."""
    known = (info.get(name) for name in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"))
    return next((str(value) for value in known if value), "")


def _folder(folder: Path) -> list[Source]:
    """The shards of a folder that `datasets.save_to_disk` wrote."""
    paths = saved_files(folder)
    if not paths:
        raise InputError(
            "data: expected files, a pattern, or a folder of one split written by datasets' save_to_disk, "
            f"got the folder {str(folder)!r}"
        )
    with reading("data", folder, "lacks files of the data set"):
        states = [(path, path.stat()) for path in paths]
    return [Source(path.stem, path.absolute().as_uri(), state.st_size, stamp=str(state.st_mtime_ns)) for path, state in states]


def _hub(name: str) -> list[Source]:
    """The shards of a data set on the Hub, which is streamed."""
    data = hub_dataset(name, streaming=True)
    shards = data.num_shards
    return [
        Source(f"{k:05d}-of-{shards:05d}", f"{name} shard {k}", 0, data.shard(num_shards=shards, index=k))
        for k in range(shards)
    ]


def _of_one_type(records: Records, inputs: Sequence[str], kept: Sequence[str], identities: Sequence[_Identities]) -> Rows:
    """The rows of a block of records, in which each column that is carried over has one type."""
    rows = Rows(_row_of(record, inputs, kept) for record in records)
    for column, identity in zip(kept, identities, strict=True):
        rows = identity.of_one_type(rows, records.types.get(column))
    return rows


def _row_of(record: Record, inputs: Sequence[str], kept: Sequence[str]) -> Row:
    """The row of a record, or the reason why it has no value."""
    mapping, reason = record
    if reason is None and not hasattr(mapping, "keys"):
        reason = f"expected an object, got {type(mapping).__name__}"
    if reason is not None:
        return Row(None, (None,) * len(kept), reason)
    values = tuple(mapping.get(name) for name in kept)
    missing = [name for name in inputs if name not in mapping]
    if missing:
        return Row(None, values, no_column(missing[0]))
    return Row(mapping[inputs[0]] if len(inputs) == 1 else [mapping[name] for name in inputs], values)


def no_column(column: str) -> str:
    """Return the reason for rejecting a row that lacks the column."""
    return f"no column {column!r}"


class _Identities:
    """Gives the identities of a shard, a column that is carried over, one Arrow type, so that Parquet can keep them.

    It is the column's type in Parquet and Arrow shards. Of other shards it is the type of the first rows' identities, or text
    where these are nested, all null, of several types, or integers beyond 64 bits. In a column of text other values are written
    as JSON. A row whose identity is of another type gets a reason.
    """

    def __init__(self, names: Sequence[str], column: int) -> None:
        self._name, self._column = "id" if len(names) == 1 else names[column], column
        self._type: Any = None

    def of_one_type(self, rows: Rows, type_of_column: Any) -> Rows:
        """Return the rows of the next block with identities of the shard's type.

        Raises:
            formats.ColumnError: Parquet has no such type.
        """
        import pyarrow

        values = [row.kept[self._column] for row in rows]
        if self._type is None:
            known = type_of_column is not None and not pyarrow.types.is_null(type_of_column)
            self._type = type_of_column if known else _type_of(values)
            _require_parquet(self._type)
        typed = Rows(map(self._row, rows)) if _array(values, self._type) is None else rows
        typed.kept_types = (*rows.kept_types, self._type)
        return typed

    def _row(self, row: Row) -> Row:
        """The row with its identity as text where the type is text, or with a reason."""
        import pyarrow

        value = row.kept[self._column]
        if pyarrow.types.is_string(self._type) and value is not None and not isinstance(value, str):
            value = _as_json(value)
        if _array([value], self._type) is not None:
            return Row(row.value, self._with(row, value), row.reason)
        problem = f"expected {self._type}, as in the first rows, got {type(value).__name__}" if is_utf8(value) else "not UTF-8"
        return Row(row.value, self._with(row, value), row.reason or f"{self._name}: {problem}")

    def _with(self, row: Row, value: Any) -> tuple[Any, ...]:
        """The row's kept values with another value in this column."""
        return (*row.kept[: self._column], value, *row.kept[self._column + 1 :])


def _type_of(values: Iterable[Any]) -> Any:
    """The Arrow type of identities: text unless all of them are of one type that is not nested."""
    import pyarrow

    array = _array(list(values), None)
    nested = array is None or pyarrow.types.is_null(array.type) or pyarrow.types.is_nested(array.type)
    return pyarrow.string() if nested else array.type


def _array(values: list[Any], kind: Any) -> Any:
    """The values as an Arrow array of a type, None if they are not of this type. Arrow makes integers of fractions."""
    import pyarrow

    try:
        array = pyarrow.array(values, kind)
    except (ValueError, TypeError, OverflowError, pyarrow.ArrowException):
        return None
    same = (
        kind is None
        or pyarrow.types.is_nested(kind)
        or all(a == b or b != b for a, b in zip(array.to_pylist(), values, strict=True))
    )
    return array if same else None


def _as_json(value: Any) -> str:
    """A value as JSON, or as Python writes it where JSON has no such value."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def _require_parquet(kind: Any) -> None:
    """Raise formats.ColumnError if Parquet files have no such type."""
    import pyarrow.parquet

    try:
        empty = pyarrow.table({"id": pyarrow.array([], kind)})
        pyarrow.parquet.write_table(empty, io.BytesIO())
    except pyarrow.ArrowException as error:
        raise formats.ColumnError(f"expected identities that Parquet can keep, got {kind}") from error
