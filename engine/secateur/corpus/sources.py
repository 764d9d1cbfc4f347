"""A corpus's shards, wherever they lie and however they are written, as a stream of rows each."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from secateur.data.examples import hub_dataset
from secateur.support.compat import saved_data_files
from secateur.support.errors import InputError, first_line

TEXT, JSONL, TABLES = (".txt", ".text"), (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}
COMPRESSED = (".gz", ".zst", ".zstd")
FORMATS = (".parquet", ".arrow", *JSONL, *TABLES, *TEXT)


class ShardError(Exception):
    """A shard that cannot be read to its end, or written; the other shards of the corpus can."""


class ColumnError(ShardError):
    """A shard without a column that was asked for."""


@dataclass(frozen=True)
class Row:
    """What a row holds in the columns asked for. reason: why it holds no value that could be scored, where that is known."""

    value: Any
    identity: Any = None
    reason: str | None = None


@dataclass(frozen=True)
class Source:
    """One shard. name: of its output, relative and without a suffix of its own; place: path or URL; size: bytes, or rows where
    there are no bytes to count."""

    name: str
    place: str
    size: int
    rows: Any = None

    def read(self, column: str, identity: str | None = None, chunk: int = 256) -> Iterator[tuple[list[Row], float]]:
        """The rows in order, up to `chunk` at a time, each time with the share of the shard that has been read.

        A row's value is text wherever the file says so; whether it can be scored is for others to find out. Text that is not
        UTF-8 comes with lone surrogates for the bytes that are not. Raises ShardError: a missing, truncated or corrupt file; a
        missing column.
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
            # Arrow's own errors are ValueErrors and OSErrors.
            raise ShardError(f"{self.place}: cannot be read to its end: {first_line(error)}") from error


def find_sources(data: str) -> list[Source]:
    """The shards that `data` names, sorted by name.

    data: a file, a pattern, or several of them between commas, local or at any URL that fsspec knows (s3://, gs://, hf://,
    https://, ...); a folder written by `datasets.save_to_disk`; "builtin:TASK"; or the name of a data set on the Hub,
    "owner/name" or "owner/name:split". Files are Parquet, Arrow, JSONL, CSV, TSV, or text with a document a line; all but the
    first two also with .gz or .zst.
    Raises InputError: nothing there, an unknown format, two shards whose outputs would have one name.
    """
    found = [source for part in data.split(",") for source in _named(part.strip())]
    names: dict[str, str] = {}
    for source in found:
        other = names.setdefault(source.name, source.place)
        if other is not source.place:
            raise InputError(f"data: {other!r} and {source.place!r} would both be scored into {source.name!r}")
    return sorted(found, key=lambda source: source.name)


def _named(data: str) -> list[Source]:
    if data.startswith("builtin:"):
        from secateur.data import builtin

        rows = builtin.examples(data.removeprefix("builtin:"))
        return [Source(data.removeprefix("builtin:"), data, len(rows), rows)]
    if Path(data).is_dir():
        return _folder(Path(data))
    found = _files(data)
    if found:
        return found
    pattern = any(mark in data for mark in "*?[")
    if pattern or "://" in data or _format(data) in FORMATS or Path(data).is_absolute() or data.startswith("."):
        raise InputError(f"data: no such file{'s' if pattern else ''}: {data!r}")
    return _hub(data)


def _files(data: str) -> list[Source]:
    import fsspec

    try:
        system, pattern = fsspec.core.url_to_fs(data)
        details = {path: each for path, each in system.glob(pattern, detail=True).items() if each["type"] == "file"}
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"data: {data!r} cannot be listed: {first_line(error)}") from error
    for path in details:
        if _format(path) not in FORMATS:
            known = ", ".join(FORMATS)
            raise InputError(f"data: expected files ending in {known}, text also in {' or '.join(COMPRESSED)}, got {path!r}")
    # Relative to the part of the pattern that names no file yet, so that folders within it come back in the output.
    fixed = pattern[: min((pattern.index(mark) for mark in "*?[" if mark in pattern), default=len(pattern))]
    base = fixed.rpartition("/")[0]
    return [
        Source(path.removeprefix(base).lstrip("/").removesuffix(".parquet"), system.unstrip_protocol(path), each["size"] or 0)
        for path, each in details.items()
    ]


def _folder(folder: Path) -> list[Source]:
    if not (folder / "state.json").is_file():
        raise InputError(
            "data: expected files, a pattern, or a folder of one split written by datasets' save_to_disk, "
            f"got the folder {str(folder)!r}"
        )
    paths = [folder / name for name in saved_data_files(folder)]
    return [Source(path.stem, path.absolute().as_uri(), path.stat().st_size) for path in paths]


def _hub(name: str) -> list[Source]:
    data = hub_dataset(name, streaming=True)
    shards = data.num_shards
    return [
        Source(f"{k:05d}-of-{shards:05d}", f"{name} shard {k}", 0, data.shard(num_shards=shards, index=k))
        for k in range(shards)
    ]


def _format(path: str) -> str:
    name = PurePosixPath(path)
    return PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def _mappings(rows: Any, size: int, column: str, identity: str | None, chunk: int) -> Iterator[tuple[list[Row], float]]:
    found: list[Row] = []
    for number, row in enumerate(rows, start=1):
        found.append(_of_mapping(row, column, identity))
        if len(found) == chunk:
            yield found, min(number / size, 1.0) if size else 0.0
            found = []
    yield found, 1.0


def _file(place: str, size: int, column: str, identity: str | None, chunk: int) -> Iterator[tuple[list[Row], float]]:
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
            found: list[Row] = []
            for row in rows:
                found.append(row)
                if len(found) == chunk:
                    yield found, min(raw.tell() / size, 1.0) if size else 0.0
                    found = []
            yield found, 1.0


def _decompressed(raw: Any, place: str) -> Any:
    """The file's bytes as they were before compression, line by line."""
    if place.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if place.endswith((".zst", ".zstd")):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return raw


def _parquet(raw: Any, column: str, identity: str | None, chunk: int) -> Iterator[tuple[list[Row], float]]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(raw)
    wanted = _columns(file.schema_arrow.names, column, identity)
    rows, done = file.metadata.num_rows, 0
    for batch in file.iter_batches(batch_size=chunk, columns=wanted):
        done += batch.num_rows
        yield _of_batch(batch, column, identity), done / rows


def _arrow(raw: Any, size: int, column: str, identity: str | None) -> Iterator[tuple[list[Row], float]]:
    import pyarrow

    with pyarrow.ipc.open_stream(raw) as stream:
        _columns(stream.schema.names, column, identity)
        for batch in stream:
            yield _of_batch(batch, column, identity), min(raw.tell() / size, 1.0) if size else 0.0


def _columns(names: list[str], column: str, identity: str | None) -> list[str]:
    wanted = [column] if identity is None else list(dict.fromkeys([column, identity]))
    for each in wanted:
        if each not in names:
            raise ColumnError(f"expected the column {each!r}, got {', '.join(map(repr, names))}")
    return wanted


def _of_batch(batch: Any, column: str, identity: str | None) -> list[Row]:
    values, identities = _values(batch.column(column)), [None] * batch.num_rows
    if identity is not None:
        identities = _values(batch.column(identity))
    return [Row(value, each) for value, each in zip(values, identities, strict=True)]


def _values(column: Any) -> list[Any]:
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        found: list[Any] = column.to_pylist()
        return found
    # As bytes first: text that is not UTF-8 is a row to reject, not the end of the shard.
    raw = column.cast(pyarrow.large_binary() if types.is_large_string(column.type) else pyarrow.binary())
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw.to_pylist()]


def _json_lines(lines: Any, column: str, identity: str | None) -> Iterator[Row]:
    for line in lines:
        text = line.decode("utf-8", "surrogateescape").strip()
        if text:
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Row(None, reason=f"no JSON: {first_line(error)}")
            else:
                yield _of_mapping(found, column, identity)


def _of_mapping(found: Any, column: str, identity: str | None) -> Row:
    if not hasattr(found, "keys"):
        return Row(None, reason=f"expected an object, got {type(found).__name__}")
    own = None if identity is None else found.get(identity)
    return Row(found[column], own) if column in found else Row(None, own, no_column(column))


def no_column(column: str) -> str:
    """Why a row without the column is rejected."""
    return f"no column {column!r}"


def _table(lines: Any, delimiter: str, column: str, identity: str | None) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(lines, "utf-8-sig", "surrogateescape", newline="")
    try:
        reader = csv.DictReader(text, delimiter=delimiter)
        _columns(list(reader.fieldnames or []), column, identity)
        for found in reader:
            yield Row(found[column], None if identity is None else found[identity])
    finally:
        text.detach()  # The file is its opener's to close.


def _text_lines(lines: Any) -> Iterator[Row]:
    for line in lines:
        yield Row(line.decode("utf-8", "surrogateescape").rstrip("\r\n"))
