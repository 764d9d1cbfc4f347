"""The shards of a corpus, local or remote, in any of the formats, as streams of rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from secateur.data.examples import hub_dataset
from secateur.support.compat import saved_data_files
from secateur.support.errors import InputError, first_line, reading
from secateur.support.urls import redacted

TEXT, JSONL, TABLES = (".txt", ".text"), (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}
COMPRESSED = (".gz", ".zst", ".zstd")
FORMATS = (".parquet", ".arrow", *JSONL, *TABLES, *TEXT)


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
        identity: The value of the identity's column.
        reason: Why there is no value to score, where this is already known.
    """

    value: Any
    identity: Any = None
    reason: str | None = None


@dataclass(frozen=True)
class Source:
    """A shard.

    Attributes:
        name: The name of its output: a relative path without the output's suffix.
        place: Its path or URL.
        size: Bytes, or rows where there are no bytes to count.
        rows: The rows themselves, where the shard is not a file.
        stamp: A text that changes when the file changes: its time of change, or an object store's tag; empty if none is known.
    """

    name: str
    place: str
    size: int
    rows: Any = None
    stamp: str = ""

    def read(self, column: str, identity: str | None = None, chunk: int = 256) -> Iterator[tuple[list[Row], float]]:
        """Read the rows in order.

        A row's value is text where the file says so; other code decides whether it can be scored. In text that is not UTF-8,
        lone surrogates stand for the invalid bytes.

        Args:
            column: The column of the text.
            identity: A second column to read.
            chunk: The most rows to yield at a time.

        Yields:
            Rows, and the share of the shard that has been read.

        Raises:
            ShardError: The file is missing, truncated or corrupt, or lacks a column.
        """
        try:
            if self.rows is not None:
                yield from _mappings(self.rows, self.size, column, identity, chunk)
            else:
                yield from _file(self.place, self.size, column, identity, chunk)
        except ColumnError as error:
            raise ColumnError(f"{self.place}: {error}") from None
        except FileNotFoundError as error:
            raise ShardError(f"{self.place}: no such file") from error
        except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
            # Arrow's errors are ValueErrors and OSErrors.
            raise ShardError(f"{self.place}: cannot be read to its end: {first_line(error)}") from error


def find_sources(data: str) -> list[Source]:
    """Return the shards that `data` names, sorted by name.

    Args:
        data: A file, a pattern, or several of them between commas, local or at any URL that fsspec knows (s3://, gs://, hf://,
            https://, ...); a folder written by `datasets.save_to_disk`; "builtin:TASK"; or the name of a data set on the Hub,
            "owner/name" or "owner/name:split". Files are Parquet, Arrow, JSONL, CSV, TSV, or text with a document on each line.
            All but the first two may be compressed, as .gz or .zst.

    Raises:
        InputError: There are no such files, a format is unknown, or the outputs of two shards would have the same name.
    """
    sources = [source for part in data.split(",") for source in _named(part.strip())]
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
    if pattern or "://" in data or _format(data) in FORMATS or Path(data).is_absolute() or data.startswith("."):
        raise InputError(f"data: no such file{'s' if pattern else ''}: {data!r}")
    return _hub(data)


def _files(data: str) -> list[Source]:
    """The shards of a file, a pattern or a URL; none if no file matches."""
    import fsspec

    try:
        system, pattern = fsspec.core.url_to_fs(data)
        details = {path: info for path, info in system.glob(pattern, detail=True).items() if info["type"] == "file"}
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"data: {data!r} cannot be listed: {first_line(error)}") from error
    for path in details:
        if _format(path) not in FORMATS:
            known = ", ".join(FORMATS)
            raise InputError(f"data: expected files ending in {known}, text also in {' or '.join(COMPRESSED)}, got {path!r}")
    # Names are relative to the folder before the first wildcard, so that the output has the same folders below it.
    fixed = pattern[: min((pattern.index(mark) for mark in "*?[" if mark in pattern), default=len(pattern))]
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
    if not (folder / "state.json").is_file():
        raise InputError(
            "data: expected files, a pattern, or a folder of one split written by datasets' save_to_disk, "
            f"got the folder {str(folder)!r}"
        )
    with reading("data", folder / "state.json", "is damaged"):
        states = [(path, path.stat()) for path in (folder / name for name in saved_data_files(folder))]
    return [Source(path.stem, path.absolute().as_uri(), state.st_size, stamp=str(state.st_mtime_ns)) for path, state in states]


def _hub(name: str) -> list[Source]:
    """The shards of a data set on the Hub, which is streamed."""
    data = hub_dataset(name, streaming=True)
    shards = data.num_shards
    return [
        Source(f"{k:05d}-of-{shards:05d}", f"{name} shard {k}", 0, data.shard(num_shards=shards, index=k))
        for k in range(shards)
    ]


def _format(path: str) -> str:
    """The suffix that tells a file's format, without the suffix of its compression."""
    name = PurePosixPath(path)
    return PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def _mappings(rows: Any, size: int, column: str, identity: str | None, chunk: int) -> Iterator[tuple[list[Row], float]]:
    """Rows of mappings, in chunks."""
    read = 0

    def counted() -> Iterator[Row]:
        nonlocal read
        for mapping in rows:
            read += 1
            yield _row_of(mapping, column, identity)

    yield from _chunks(counted(), chunk, lambda: read, size)


def _chunks(rows: Iterable[Row], chunk: int, position: Callable[[], int], size: int) -> Iterator[tuple[list[Row], float]]:
    """Chunks of rows, with the share of the shard that is read: position() of `size`."""
    buffer: list[Row] = []
    for row in rows:
        buffer.append(row)
        if len(buffer) == chunk:
            yield buffer, _share(position(), size)
            buffer = []
    yield buffer, 1.0


def _share(position: int, size: int) -> float:
    """The share of a shard that has been read; 0 where its size is unknown."""
    return min(position / size, 1.0) if size else 0.0


def _file(place: str, size: int, column: str, identity: str | None, chunk: int) -> Iterator[tuple[list[Row], float]]:
    """Rows of a file, in chunks."""
    import fsspec

    with fsspec.open(place, "rb") as raw:
        kind = _format(place)
        if kind == ".parquet":
            yield from _parquet(raw, column, identity, chunk)
        elif kind == ".arrow":
            yield from _arrow(raw, size, column, identity)
        else:
            lines = _decompressed(raw, place)
            rows: Iterator[Row]
            if kind in TABLES:
                rows = _table(lines, TABLES[kind], column, identity)
            else:
                rows = _json_lines(lines, column, identity) if kind in JSONL else _text_lines(lines)
            yield from _chunks(rows, chunk, raw.tell, size)


def _decompressed(raw: Any, place: str) -> Any:
    """The file's decompressed bytes, line by line."""
    if place.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if place.endswith((".zst", ".zstd")):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return raw


def _parquet(raw: Any, column: str, identity: str | None, chunk: int) -> Iterator[tuple[list[Row], float]]:
    """Rows of a Parquet file, a batch at a time."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(raw)
    wanted = _columns(file.schema_arrow.names, column, identity)
    rows, done = file.metadata.num_rows, 0
    for batch in file.iter_batches(batch_size=chunk, columns=wanted):
        done += batch.num_rows
        yield _rows_of(batch, column, identity), done / rows


def _arrow(raw: Any, size: int, column: str, identity: str | None) -> Iterator[tuple[list[Row], float]]:
    """Rows of an Arrow stream, in the batches that it has."""
    import pyarrow

    with pyarrow.ipc.open_stream(raw) as stream:
        _columns(stream.schema.names, column, identity)
        for batch in stream:
            yield _rows_of(batch, column, identity), _share(raw.tell(), size)


def _columns(names: list[str], column: str, identity: str | None) -> list[str]:
    """The columns to read. Raises ColumnError if the shard lacks one."""
    requested = [column] if identity is None else list(dict.fromkeys([column, identity]))
    for name in requested:
        if name not in names:
            raise ColumnError(f"expected the column {name!r}, got {', '.join(map(repr, names))}")
    return requested


def _rows_of(batch: Any, column: str, identity: str | None) -> list[Row]:
    """The rows of an Arrow batch."""
    values, identities = _values(batch.column(column)), [None] * batch.num_rows
    if identity is not None:
        identities = _values(batch.column(identity))
    return [Row(*pair) for pair in zip(values, identities, strict=True)]


def _values(column: Any) -> list[Any]:
    """The values of an Arrow column."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        values: list[Any] = column.to_pylist()
        return values
    # Read as bytes first: text that is not UTF-8 rejects a row, and does not end the shard.
    raw = column.cast(pyarrow.large_binary() if types.is_large_string(column.type) else pyarrow.binary())
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw.to_pylist()]


def _json_lines(lines: Any, column: str, identity: str | None) -> Iterator[Row]:
    """Rows of JSONL."""
    for line in lines:
        text = line.decode("utf-8", "surrogateescape").strip()
        if text:
            try:
                document = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Row(None, reason=f"no JSON: {first_line(error)}")
            else:
                yield _row_of(document, column, identity)


def _row_of(mapping: Any, column: str, identity: str | None) -> Row:
    """The row of a mapping, or the reason why it has no value."""
    if not hasattr(mapping, "keys"):
        return Row(None, reason=f"expected an object, got {type(mapping).__name__}")
    identity_value = None if identity is None else mapping.get(identity)
    return Row(mapping[column], identity_value) if column in mapping else Row(None, identity_value, no_column(column))


def no_column(column: str) -> str:
    """Return the reason for rejecting a row that lacks the column."""
    return f"no column {column!r}"


def _table(lines: Any, delimiter: str, column: str, identity: str | None) -> Iterator[Row]:
    """Rows of CSV or TSV."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(lines, "utf-8-sig", "surrogateescape", newline="")
    try:
        reader = csv.DictReader(text, delimiter=delimiter)
        _columns(list(reader.fieldnames or []), column, identity)
        for record in reader:
            yield Row(record[column], None if identity is None else record[identity])
    finally:
        text.detach()  # The caller, which opened the file, closes it.


def _text_lines(lines: Any) -> Iterator[Row]:
    """Rows of text, one for each line."""
    for line in lines:
        yield Row(line.decode("utf-8", "surrogateescape").rstrip("\r\n"))
