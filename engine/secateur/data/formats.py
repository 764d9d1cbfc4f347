"""Records of Parquet, Arrow, JSON, CSV, TSV and text files, read in blocks. Examples and corpora come from here."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from secateur.support.fields import shown

COLUMNAR, JSON, TEXT = (".parquet", ".arrow"), (".jsonl", ".ndjson", ".json"), (".txt", ".text")
TABLES = {".csv": ",", ".tsv": "\t"}  # The delimiters.
COMPRESSED = (".gz", ".zst", ".zstd")
# Exceptions of a file that is missing, truncated or corrupt.
UNREADABLE = (OSError, EOFError, ValueError, OverflowError, zlib.error)
# The most rows of a block, and the characters (in Parquet files the bytes) after which a block ends early.
ROWS, CHARACTERS = 256, 1 << 24
# A quoted field that is not closed within so many characters counts as never closed.
LONGEST_QUOTED = 1 << 27
_ARROW_FILE = b"ARROW1"
_SHOWN = 20  # The most columns that a message names.
_SURROGATE = re.compile("[\ud800-\udfff]")


class ColumnError(ValueError):
    """A file lacks a column that was requested, or has two of its name."""


class Record(NamedTuple):
    """A record of a file.

    Attributes:
        value: A mapping from columns to values. A line of JSON may give another value, which other code refuses.
        reason: Why the record cannot be read; None if it can.
    """

    value: Any
    reason: str | None = None


class Records(list[Record]):
    """A block of records.

    Attributes:
        types: The Arrow types of the columns, where the file tells them.
        schema: The Arrow schema of the file, where it has one.
    """

    types: Mapping[str, Any] = MappingProxyType({})
    schema: Any = None


Block = tuple[Records, float]


class RowRange(NamedTuple):
    """Consecutive rows of a file.

    Attributes:
        first: The first row, from 0.
        rows: The number of rows.
        offset: The byte at which the first row's line begins; 0 in Parquet files.
        lines: The lines before it; 0 in Parquet files.
    """

    first: int
    rows: int
    offset: int = 0
    lines: int = 0


def format_of(path: str) -> str:
    """Return the suffix that tells a file's format, in lower case, without the suffix of its compression."""
    name = PurePosixPath(path.lower())
    return PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def is_utf8(value: Any) -> bool:
    """Return whether a text, or each text of a list, can be encoded as UTF-8: it has no lone surrogates."""
    if isinstance(value, str):
        return _SURROGATE.search(value) is None
    return not isinstance(value, list) or all(map(is_utf8, value))


def read_blocks(
    raw: Any, name: str, size: int, columns: Sequence[str], rows: int = ROWS, only: RowRange | None = None
) -> Iterator[Block]:
    """Read the records of a file in order.

    In text that is not UTF-8, lone surrogates stand for the invalid bytes. A byte order mark is skipped.

    - JSON: an object on each line; or one array of objects, or one object, over several lines. Only a line feed ends a line.
      The array or the object is read whole.
    - CSV (RFC 4180): the first line names the columns. Lines end in LF, CRLF or CR. A field in quotes may have delimiters, line
      ends and doubled quotes. A record with more or fewer fields than the header, or with a quote that is never closed, has a
      reason; reading goes on in the line after its first one.
    - TSV: as CSV, but many TSV files do not quote. Quotes are ordinary characters in a line where they do not form a quoted
      field, but which has as many fields as the header. The same holds if a quoted field begins in a line and ends in another
      line that both have as many fields as the header, where the header has at least two.
    - Text: each line is the value of the first of `columns`.

    Args:
        raw: The binary file.
        name: Its name, whose suffixes tell its format and its compression.
        size: Its bytes, or those of the range; 0 if unknown.
        columns: The columns that are needed. Parquet and Arrow records have no others.
        rows: The most rows of a block.
        only: Read only these rows, which are one of the file's `row_ranges`. They are what reading the whole file gives.

    Yields:
        Records, and the share of the file that has been read. The last block may be empty.

    Raises:
        ColumnError: The file's header lacks a column, or has it twice.
        UNREADABLE: The file cannot be read to its end.
    """
    kind = format_of(name)
    if kind in COLUMNAR:
        import pyarrow

        try:
            yield from _parquet(raw, columns, rows, only) if kind == ".parquet" else _arrow(raw, size, columns, rows)
        except pyarrow.ArrowException as error:  # Not all of them are ValueErrors.
            raise ValueError(str(error)) from error
        return
    lines = _Lines(_decompressed(raw, name.lower()), "" if kind in TABLES else "\n")
    try:
        header = _header(lines, TABLES[kind], columns) if kind in TABLES else []
        if only is not None:
            lines.go_to(only)
        if kind in TABLES:
            records = _table(lines, TABLES[kind], header)
        elif kind in JSON:
            records = _json(lines, columns) if only is None else _json_lines(lines, columns)
        else:
            records = (Record({columns[0]: line.rstrip("\r\n")}) for line in lines)
        first = 0 if only is None else only.offset
        records = records if only is None else islice(records, only.rows)
        yield from _blocks(records, rows, lines, lambda: _share(raw.tell() - first, size))
    finally:
        lines.text.detach()  # The caller, which opened the file, closes it.


def row_ranges(raw: Any, name: str, columns: Sequence[str], rows: int, characters: int) -> list[RowRange] | str:
    """Divide a file into ranges of rows, which `read_blocks` can read each for itself.

    A Parquet file tells its rows. Any other file is read once, by the same rules as `read_blocks`. So a range never begins
    inside a record of a CSV file whose quoted fields have line ends.

    Args:
        raw: The binary file.
        name: As in `read_blocks`.
        columns: As in `read_blocks`.
        rows: The most rows of a range.
        characters: The characters, in Parquet files the bytes without compression, after which a range ends early.

    Returns:
        The ranges in order, together all rows of the file; or why the file cannot be divided.

    Raises:
        ColumnError: As in `read_blocks`.
        UNREADABLE: The file cannot be read to its end.
    """
    kind = format_of(name)
    if name.lower().endswith(COMPRESSED):
        return "compressed"
    if kind == ".parquet":
        import pyarrow.parquet

        try:
            count, size = _rows_and_bytes(pyarrow.parquet.ParquetFile(raw).metadata)
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from error
        rows = max(1, min(rows, characters * count // max(size, 1)))
        return [RowRange(first, min(rows, count - first)) for first in range(0, count, rows)]
    if kind in COLUMNAR:
        return "an Arrow file"
    lines = _CountedLines(raw, "" if kind in TABLES else "\n")
    try:
        if kind in JSON:
            if _is_whole(*_first_two(lines), _decoder(columns)):
                return "one JSON document over several lines"
            lines.go_to(RowRange(0, 0))
        records: Iterator[Any] = lines
        if kind in TABLES:
            records = _table(lines, TABLES[kind], _header(lines, TABLES[kind], columns))
        elif kind in JSON:
            records = (line for line in lines if not line.isspace())
        return _ranges(records, lines, rows, characters)
    finally:
        lines.text.detach()  # The caller, which opened the file, closes it.


def _ranges(records: Iterator[Any], lines: _CountedLines, rows: int, characters: int) -> list[RowRange]:
    """The ranges of records that are read from `lines`, which holds no line back between two records."""
    ranges: list[RowRange] = []
    offset, number, begun, first, row = lines.offset, lines.number, lines.characters, 0, 0
    for row, _ in enumerate(records, start=1):
        if row - first == rows or lines.characters - begun >= characters:
            ranges.append(RowRange(first, row - first, offset, number))
            offset, number, begun, first = lines.offset, lines.number, lines.characters, row
    return [*ranges, RowRange(first, row - first, offset, number)] if row > first else ranges


def columns_of(raw: Any, name: str) -> list[str]:
    """Return the columns of a file: those of its header or schema, or of its first record.

    Args:
        raw: The binary file.
        name: As in `read_blocks`.

    Returns:
        The names; none where the file has no readable first record.

    Raises:
        UNREADABLE: The file cannot be read.
    """
    kind = format_of(name)
    if kind in COLUMNAR:
        import pyarrow
        import pyarrow.parquet

        try:
            if kind == ".parquet":
                return list(pyarrow.parquet.ParquetFile(raw).schema_arrow.names)
            with _opened_arrow(raw) as reader:
                return list(reader.schema.names)
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from error
    records, _ = next(read_blocks(raw, name, 0, (), 1), (Records(), 1.0))
    return list(records[0].value) if records and isinstance(records[0].value, dict) else []


def require_columns(names: Sequence[str], columns: Iterable[str]) -> None:
    """Check that a header names each of `columns` once.

    Raises:
        ColumnError: It does not.
    """
    for column in columns:
        if column not in names:
            few = ", ".join(map(shown, names[:_SHOWN])) + (" ..." if len(names) > _SHOWN else "")
            raise ColumnError(f"expected the column {column!r}, got {few}")
        if names.count(column) > 1:
            raise ColumnError(f"expected one column {column!r}, got {names.count(column)} of this name")


class _Lines:
    """The lines of a text file, with their line ends. Lines can be given back.

    Attributes:
        text: The decoded file.
        number: The lines that were returned and not given back.
        characters: The characters of all lines that were read.
    """

    def __init__(self, raw: Any, newline: str) -> None:
        self._newline = newline
        self.text = io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline=newline)
        self.number = self.characters = 0
        self._back: deque[str] = deque()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._back:
            line = self._back.popleft()
        else:
            line = next(self.text)
            if not self.characters and line.startswith(("\udcff\udcfe", "\udcfe\udcff")):
                raise ValueError("expected UTF-8, got UTF-16")
            self.characters += len(line)
        self.number += 1
        return line

    def give_back(self, lines: Sequence[str]) -> None:
        """Return these last lines again."""
        self._back.extendleft(reversed(lines))
        self.number -= len(lines)

    def go_to(self, place: RowRange) -> None:
        """Go on with the first line of a range of rows."""
        raw = self.text.detach()
        raw.seek(place.offset)
        # Only the file begins with a byte order mark. Elsewhere the same bytes are text.
        self.text = io.TextIOWrapper(raw, "utf-8" if place.offset else "utf-8-sig", "surrogateescape", newline=self._newline)
        self.number, self.characters = place.lines, place.offset
        self._back.clear()


class _CountedLines(_Lines):
    """Lines that also count bytes.

    Attributes:
        offset: The byte at which the next line begins.
    """

    def __init__(self, raw: Any, newline: str) -> None:
        self._mark = len(codecs.BOM_UTF8) * (raw.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8)
        raw.seek(0)
        super().__init__(raw, newline)
        self.offset = self._mark

    def __next__(self) -> str:
        line = super().__next__()
        self.offset += _bytes_of(line)
        return line

    def give_back(self, lines: Sequence[str]) -> None:
        """Return these last lines again."""
        super().give_back(lines)
        self.offset -= sum(map(_bytes_of, lines))

    def go_to(self, place: RowRange) -> None:
        """Go on with the first line of a range of rows."""
        super().go_to(place)
        self.offset = place.offset or self._mark


def _bytes_of(line: str) -> int:
    """The bytes of a line in its file."""
    return len(line) if line.isascii() else len(line.encode("utf-8", "surrogateescape"))


def _decompressed(raw: Any, name: str) -> Any:
    """The file's decompressed bytes."""
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith((".zst", ".zstd")):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return raw


def _share(position: int, size: int) -> float:
    """The share of a file that has been read; 0 where its size is unknown."""
    return min(position / size, 1.0) if size else 0.0


def _blocks(records: Iterable[Record], rows: int, lines: _Lines, share: Callable[[], float]) -> Iterator[Block]:
    """Blocks of records, with the share of the file that is read."""
    block, begun = Records(), 0
    for record in records:
        block.append(record)
        if len(block) == rows or lines.characters - begun >= CHARACTERS:
            yield block, share()
            block, begun = Records(), lines.characters
    yield block, 1.0


def _parquet(raw: Any, columns: Sequence[str], rows: int, only: RowRange | None) -> Iterator[Block]:
    """Blocks of a Parquet file. Of the row groups before a range nothing is read."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(raw)
    schema = file.schema_arrow
    require_columns(schema.names, columns)
    of_dictionaries = any(pyarrow.types.is_dictionary(schema.field(column).type) for column in columns)
    if of_dictionaries:
        file = pyarrow.parquet.ParquetFile(raw, metadata=_without_arrow_types(file.metadata))
    count, size = _rows_and_bytes(file.metadata)
    rows = max(1, min(rows, CHARACTERS * count // max(size, 1)))
    first, wanted = (0, count) if only is None else only[:2]
    groups, begin, end = [], 0, 0  # The row groups that have rows of the range, and the row that they begin with.
    for group in range(file.metadata.num_row_groups):
        end += file.metadata.row_group(group).num_rows
        if end <= first:
            begin = end
        elif end - file.metadata.row_group(group).num_rows < first + wanted:
            groups.append(group)
    done, skip = 0, first - begin
    for whole in file.iter_batches(batch_size=rows, row_groups=groups, columns=list(dict.fromkeys(columns))):
        before = min(skip, whole.num_rows)
        batch, skip = whole.slice(before, wanted - done), skip - before
        done += batch.num_rows
        if batch.num_rows:
            yield _records_of(_of_types(batch, schema) if of_dictionaries else batch, columns), done / wanted
        if done == wanted:
            break
    yield _records_of(schema.empty_table(), columns), 1.0


def _without_arrow_types(metadata: Any) -> Any:
    """Return a Parquet file's metadata without the Arrow types of its columns.

    By these types pyarrow reads text as a dictionary. It then converts the dictionary's indices, unless they are int32, and
    refuses the whole column where one text is not UTF-8.
    """
    import pyarrow.parquet

    written = io.BytesIO()
    metadata.write_metadata_file(written)
    return pyarrow.parquet.read_metadata(io.BytesIO(written.getvalue().replace(b"ARROW:schema", b"arrow:schema")))


def _of_types(batch: Any, schema: Any) -> Any:
    """Return an Arrow batch whose columns have their types in a schema, or those of the values where these are dictionaries."""
    import pyarrow
    from pyarrow import types

    kinds = [schema.field(name).type for name in batch.schema.names]
    kinds = [kind.value_type if types.is_dictionary(kind) else kind for kind in kinds]
    columns = [column if column.type == kind else column.cast(kind) for column, kind in zip(batch.columns, kinds, strict=True)]
    typed = pyarrow.schema(list(zip(batch.schema.names, kinds, strict=True)), metadata=schema.metadata)
    return pyarrow.RecordBatch.from_arrays(columns, schema=typed)


def _rows_and_bytes(metadata: Any) -> tuple[int, int]:
    """A Parquet file's rows, and its bytes without compression."""
    return metadata.num_rows, sum(metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups))


def _arrow(raw: Any, size: int, columns: Sequence[str], rows: int) -> Iterator[Block]:
    """Blocks of an Arrow stream or an Arrow file: the batches that it has."""
    import pyarrow

    with _opened_arrow(raw) as reader:
        require_columns(reader.schema.names, columns)
        stream = isinstance(reader, pyarrow.ipc.RecordBatchStreamReader)
        for batch in reader if stream else map(reader.get_batch, range(reader.num_record_batches)):
            yield _records_of(batch, columns), _share(raw.tell(), size)
        yield _records_of(reader.schema.empty_table(), columns), 1.0


def _opened_arrow(raw: Any) -> Any:
    """A reader of an Arrow stream, or of an Arrow file (Feather), which begins with other bytes."""
    import pyarrow

    magic = raw.read(len(_ARROW_FILE))
    raw.seek(0)
    return (pyarrow.ipc.open_file if magic == _ARROW_FILE else pyarrow.ipc.open_stream)(raw)


def _records_of(batch: Any, columns: Sequence[str]) -> Records:
    """The records of an Arrow batch or table."""
    from pyarrow import types

    values = (_values(batch.column(column)) for column in columns)
    records = Records(Record(dict(zip(columns, row, strict=True))) for row in zip(*values, strict=True))
    kinds = {column: batch.schema.field(column).type for column in columns}
    records.schema = batch.schema
    records.types = {name: kind.value_type if types.is_dictionary(kind) else kind for name, kind in kinds.items()}
    return records


def _values(column: Any) -> list[Any]:
    """The values of an Arrow column."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        try:
            values: list[Any] = column.to_pylist()
        except (OverflowError, ValueError):  # A date outside Python's years, or a list with text that is not UTF-8.
            values = [_python_value(scalar) for scalar in column]
        return values
    # Read as bytes first: text that is not UTF-8 spoils a row, and does not end the file.
    raw = column.cast(pyarrow.large_binary() if types.is_large_string(column.type) else pyarrow.binary())
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw.to_pylist()]


def _python_value(scalar: Any) -> Any:
    """The Python value of an Arrow scalar; a text with a lone surrogate, which other code refuses, where it has none."""
    try:
        return scalar.as_py()
    except (OverflowError, ValueError):
        return "\udcff"


def _json(lines: _Lines, columns: Sequence[str]) -> Iterator[Record]:
    """Records of JSON: an object on each line; or one array of objects, or one object, over several lines."""
    decode = _decoder(columns)
    first, number, second = _first_two(lines)
    if _is_whole(first, number, second, decode):
        yield from _whole(first + second + "".join(lines), decode)
    elif first:
        yield _record(first, number, decode)
        if second:
            yield _record(second, lines.number, decode)
        yield from _json_lines(lines, columns)


def _json_lines(lines: _Lines, columns: Sequence[str]) -> Iterator[Record]:
    """Records of JSON with an object on each line."""
    decode = _decoder(columns)
    return (_record(line, lines.number, decode) for line in lines if not line.isspace())


def _first_two(lines: _Lines) -> tuple[str, int, str]:
    """The first line that is not blank, its number, and the second line that is not blank."""
    filled = (line for line in lines if not line.isspace())
    return next(filled, ""), lines.number, next(filled, "")


def _is_whole(first: str, number: int, second: str, decode: Callable[[str], Any]) -> bool:
    """Whether a JSON file with these first lines is one array or one object, instead of an object on each line."""
    array = first.lstrip().startswith("[")
    if not second:
        return array
    return first.strip() == "{" or (array and _record(first, number, decode).reason is not None)


def _decoder(columns: Sequence[str]) -> Callable[[str], Any]:
    """A decoder of JSON that refuses an object with one of `columns` twice."""
    return json.JSONDecoder(object_pairs_hook=partial(_object, columns)).decode


def _record(line: str, number: int, decode: Callable[[str], Any]) -> Record:
    """The record of a line of JSON."""
    try:
        return Record(decode(line))
    except (ValueError, RecursionError) as error:
        return Record(None, f"line {number} is not JSON: {error}")


def _whole(text: str, decode: Callable[[str], Any]) -> Iterator[Record]:
    """The records of an array of objects, or of one object."""
    try:
        document = decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    yield from map(Record, document if isinstance(document, list) else [document])


def _object(columns: Sequence[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it has one of `columns` twice: JSON leaves open which value counts."""
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        for column in columns:
            if names.count(column) > 1:
                raise ValueError(f"the key {column!r} comes {names.count(column)} times")
    return document


def _header(lines: _Lines, delimiter: str, columns: Sequence[str]) -> list[str]:
    """The header of CSV or TSV; no fields where the file has no line that is not blank."""
    csv.field_size_limit(sys.maxsize)
    for line in lines:
        if line.strip("\r\n"):
            number = lines.number
            header, reason = _fields(line, lines, delimiter, 0)
            if reason is not None:
                raise ValueError(f"line {number}: {reason}")
            require_columns(header, columns)
            return header
    return []


def _table(lines: _Lines, delimiter: str, header: Sequence[str]) -> Iterator[Record]:
    """Records of CSV or TSV, after the header."""
    for line in lines:
        if not line.strip("\r\n"):
            continue
        number = lines.number
        fields, reason = _fields(line, lines, delimiter, len(header))
        yield Record(dict(zip(header, fields, strict=True))) if reason is None else Record(None, f"line {number}: {reason}")


def _fields(line: str, lines: _Lines, delimiter: str, width: int) -> tuple[list[str], str | None]:
    """The fields of the record that begins with `line`, and the reason why they are not `width` fields. 0: any number."""
    plain = line.rstrip("\r\n").split(delimiter)
    fields, reason, taken = plain, None, [line]
    if '"' in line:
        try:
            fields = next(csv.reader(_taking(lines, taken), delimiter=delimiter, strict=True))
        except csv.Error:
            fields, reason = [], "a quote opens a field and is never closed, or a quote in the field is not doubled"
    if delimiter == "\t" and len(plain) == (width or len(plain)):
        rows_of_their_own = width > 1 and len(taken) > 1 and taken[-1].count(delimiter) + 1 == width
        if reason is not None or rows_of_their_own or len(fields) != (width or len(fields)):
            lines.give_back(taken[1:])
            fields, reason, taken = plain, None, [line]
    if reason is None and len(fields) != (width or len(fields)):
        reason = f"expected {width} fields, as in the header, got {len(fields)}"
    if reason is not None:
        lines.give_back(taken[1:])
    return fields, reason


def _taking(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    """The lines that are taken already, then further ones, which are added to them."""
    yield from list(taken)
    characters = len(taken[0])
    for line in lines:
        taken.append(line)
        yield line
        characters += len(line)
        if characters > LONGEST_QUOTED:
            return
