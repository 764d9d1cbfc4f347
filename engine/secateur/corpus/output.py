"""The files of a shard: one with a row for each scored document (Parquet, JSONL, CSV), and a JSONL file of the rejects."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.corpus.sources import Identity, column_names
from secateur.corpus.windows import WRITTEN, Window
from secateur.support.errors import InputError, first_line
from secateur.support.files import create_own, require_run_folder
from secateur.support.urls import redacted
from secateur.tasks.model_config import OutputKind

if TYPE_CHECKING:
    import pyarrow

METADATA = b"secateur"
SCORED, REJECTED, FINISHED = "shards", "rejects", "finished"
FORMATS = ("parquet", "jsonl", "csv")


@dataclass(frozen=True)
class Counts:
    """Counts of a shard or of a corpus.

    Attributes:
        rows: All rows.
        scored: Rows with a score.
        rejected: Rows without a score.
        tokens: Tokens without padding.
        padded: Tokens with padding.
        labels: Scored rows of each label; of spans, the spans of each label.
    """

    rows: int = 0
    scored: int = 0
    rejected: int = 0
    tokens: int = 0
    padded: int = 0
    labels: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        numbers: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _NUMBERS}
        labels = dict.fromkeys((*self.labels, *other.labels))
        return Counts(**numbers, labels={name: self.labels.get(name, 0) + other.labels.get(name, 0) for name in labels})

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Counts:
        """Read the counts from a mapping that has all of them, and perhaps more. Older files have no labels."""
        numbers: dict[str, Any] = {name: document[name] for name in _NUMBERS}
        return cls(**numbers, labels={**document.get("labels", {})})

    @classmethod
    def of(cls, window: Window) -> Counts:
        """Return the counts of a scored window."""
        rows = len(window.reasons)
        return cls(rows, window.scored, rows - window.scored, window.tokens, window.padded)


_NUMBERS = ("rows", "scored", "rejected", "tokens", "padded")


def label_counts(batch: pyarrow.RecordBatch, labels: Sequence[str], kind: OutputKind) -> dict[str, int]:
    """Return how many rows of a record batch have each label; none where rows have no labels.

    Args:
        batch: Scored rows, from `record_batch`. A column that is carried over may be called label, labels or spans too.
        labels: The candidate labels.
        kind: The kind of the results.
    """
    if kind == "label":
        given = batch.column("label").to_pylist()
    elif kind == "labels":
        given = [label for of_row in batch.column("labels").to_pylist() for label in of_row]
    elif kind == "spans":
        given = [span["label"] for of_row in batch.column("spans").to_pylist() for span in of_row]
    else:
        return {}
    counted = Counter(given)
    return {label: counted[label] for label in labels}


def output_names(labels: Sequence[str], kind: OutputKind) -> list[str]:
    """Return the names of the columns that tell a row's result.

    They are label and p_<label>; labels and p_<label> where any number of labels is right; value; text; or spans.
    """
    return [kind] if kind in ("value", *WRITTEN) else [kind, *(f"p_{label}" for label in labels)]


def schema_of(labels: Sequence[str], identity: Identity, window: Window) -> pyarrow.Schema:
    """Return the Arrow schema of scored rows.

    Its columns are row (int64, the position in the file, from 0), the columns that are carried over, with the types that they
    have in the shard, and the result. The result is label (the most likely label) and p_<label> (float32, the
    label's probability among the labels). Where any number of labels is right, it is labels (a list of those with a probability
    above 0.5) and p_<label> (each label's own probability). A model with one output has value (float32) alone, a task
    that generates has text alone, and a tagger has spans: a list of start, end (int32), label, score (float32) and text.
    """
    import pyarrow

    fields = [("row", pyarrow.int64()), *zip(column_names(identity), window.kept_types, strict=True)]
    return pyarrow.schema([*fields, *((name, result_type(name)) for name in output_names(labels, window.kind))])


def result_type(name: str) -> pyarrow.DataType:
    """Return the Arrow type of one of `output_names`."""
    import pyarrow

    text, place = pyarrow.string(), pyarrow.int32()
    span = {"start": place, "end": place, "label": text, "score": pyarrow.float32(), "text": text}
    types = {
        "label": pyarrow.dictionary(place, text), "labels": pyarrow.list_(text), "text": text,
        "spans": pyarrow.list_(pyarrow.struct(span)),
    }  # fmt: skip
    return types.get(name, pyarrow.float32())


def require_free_name(identity: Identity, labels: Sequence[str], kind: OutputKind) -> None:
    """Check that the columns that are carried over have other names than the columns of the scores and than each other.

    Raises:
        InputError: They have not.
    """
    taken = ("row", *output_names(labels, kind), "reason")
    names = column_names(identity)
    option = "id-column" if len(names) == 1 else "keep-columns"
    for name in names:
        if name in taken:
            raise InputError(f"{option}: expected another name than those of the scores ({', '.join(taken)}), got {name!r}")
        if names.count(name) > 1:
            raise InputError(f"{option}: expected each column once, got {name!r} {names.count(name)} times")


def record_batch(window: Window, labels: Sequence[str], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """Return the rows of a scored window that have scores.

    Args:
        window: The window.
        labels: The candidate labels.
        schema: The schema, from `schema_of`, for this window or for the first window of its shard.
    """
    import pyarrow

    rows = [k for k, reason in enumerate(window.reasons) if reason is None]
    columns = [pyarrow.array([window.first + k for k in rows], pyarrow.int64())]
    for column in range(len(schema) - len(output_names(labels, window.kind)) - 1):  # The columns that are carried over.
        columns.append(pyarrow.array([window.kept[k][column] for k in rows], schema.field(column + 1).type))
    if window.kind in WRITTEN:
        columns.append(pyarrow.array([window.written[k] for k in rows], result_type(window.kind)))
        return pyarrow.RecordBatch.from_arrays(columns, schema=schema)
    probabilities = window.probabilities()[rows]  # [scored rows, labels]
    if window.kind == "label":
        best = pyarrow.array(probabilities.argmax(1).astype(np.int32))
        columns.append(pyarrow.DictionaryArray.from_arrays(best, pyarrow.array(list(labels))))
    elif window.kind == "labels":
        above = [[label for label, p in zip(labels, of_row, strict=True) if p > 0.5] for of_row in probabilities.tolist()]
        columns.append(pyarrow.array(above, pyarrow.list_(pyarrow.string())))
    columns += [pyarrow.array(of_label.astype(np.float32)) for of_label in probabilities.T]
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def with_reasons(batch: pyarrow.RecordBatch, window: Window, identity: Identity = None) -> pyarrow.RecordBatch:
    """Extend a record batch to all rows of its window. Rejected rows get nulls, and the new column `reason` says why.

    Args:
        batch: The scored rows, from `record_batch`.
        window: The window.
        identity: The columns that are carried over.
    """
    import pyarrow

    position = iter(range(batch.num_rows))
    rows = pyarrow.array([next(position) if reason is None else None for reason in window.reasons], pyarrow.int64())
    extended = batch.take(rows)
    extended = extended.set_column(
        0, "row", pyarrow.array(range(window.first, window.first + len(window.reasons)), pyarrow.int64())
    )
    for column, name in enumerate(column_names(identity)):
        values = pyarrow.array([kept[column] for kept in window.kept], extended.schema.field(column + 1).type)
        extended = extended.set_column(column + 1, name, values)
    return extended.append_column("reason", pyarrow.array(window.reasons, pyarrow.string()))


class Folder:
    """The output folder: SCORED/<shard>.<format>, REJECTED/<shard>.jsonl, and the run's own files beside them.

    A finished shard's metadata is in its Parquet file. In the other formats it is FINISHED/<shard>.json.

    Args:
        place: A local folder, or a URL that fsspec knows.
        format: The format of the scores, one of FORMATS.

    Raises:
        InputError: The format or the URL's kind is unknown, or its package is not installed.
    """

    def __init__(self, place: str, format: str = FORMATS[0]) -> None:
        import fsspec

        if format not in FORMATS:
            raise InputError(f"format: expected {', '.join(FORMATS)}, got {format!r}")
        self.place, self.format = place, format
        try:
            self.system, self.root = fsspec.core.url_to_fs(place)
        except (ImportError, OSError, ValueError) as error:
            raise InputError(f"out: {place!r} cannot be opened: {first_line(error)}") from error
        self.local = "file" in self.system.protocol
        self._writer = ""

    def written_by(self, writer: str) -> Folder:
        """Return the same folder for one of several writers, whose half-written files have different names."""
        folder = copy.copy(self)
        folder._writer = f".{writer}"
        return folder

    def path(self, *names: str) -> str:
        """Return the path of a file or folder inside it."""
        return "/".join((self.root.rstrip("/"), *names))

    def names(self) -> list[str]:
        """Return the names in the folder; none where it does not exist."""
        if not self.system.exists(self.root):
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in self.system.ls(self.root, detail=False)]

    def read(self, name: str) -> str | None:
        """Return the text of one of the run's files, or None if it does not exist. Bytes that are not UTF-8 spoil its JSON."""
        path = self.path(name)
        return self.system.cat_file(path).decode(errors="surrogateescape") if self.system.exists(path) else None

    def write(self, name: str, text: str) -> None:
        """Write one of the run's files, completely or not at all."""
        self.system.makedirs(self.root, exist_ok=True)
        with self.create(self.partial(name)) as file:
            file.write(redacted(text).encode())
        self.rename(self.partial(name), self.path(name))

    def create(self, path: str) -> Any:
        """Open a file to write. A local file replaces what has its name, so a link is not followed."""
        return create_own(path) if self.local else self.system.open(path, "wb")

    def rename(self, source: str, target: str) -> None:
        """Give a file its final name."""
        if self.local:
            os.replace(source, target)
        else:
            self.system.mv(source, target)

    def require_writable(self) -> None:
        """Check that the folder can be written to: a local one as by `require_run_folder`, another one with an empty file.

        Raises:
            InputError: It cannot be written to.
        """
        if self.local:
            require_run_folder(self.root if "://" in self.place else self.place)
            return
        probe = self.partial("probe")
        try:
            existed = self.system.exists(self.root)
            self.system.makedirs(self.root, exist_ok=True)
            with self.system.open(probe, "wb"):
                pass
            self.system.rm_file(probe)
            if not existed and self.system.exists(self.root):
                self.system.rmdir(self.root)
        except Exception as error:  # Each file system raises types of its own; all of them mean that it cannot be written to.
            why = first_line(error)
            raise InputError(f"out: expected a folder that can be written to, got {self.place!r} ({why})") from error

    def require_inside(self, name: str) -> None:
        """Check the name of a shard, from which the names of its output files are made.

        An object store's keys may contain "..", and a listing may be anybody's: no name may lead out of the folder.

        Raises:
            InputError: The name leads out of the folder, or is not a plain relative path.
        """
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise InputError(f"data: expected names of shards without '..' and empty parts, got {name!r}")

    def partial(self, *names: str) -> str:
        """Return the path of a file that is being written. Its name begins with a dot, so readers of the folder skip it."""
        *folders, name = "/".join(names).split("/")
        return self.path(*folders, f".{name}{self._writer}.partial")

    def sweep(self) -> None:
        """Remove the half-written files of killed runs."""
        for kind in (SCORED, REJECTED, FINISHED):
            for path in self.system.find(self.path(kind)):
                if path.endswith(".partial"):
                    self.system.rm_file(path)

    def remove(self, name: str) -> None:
        """Remove the files of a finished shard."""
        kinds = ((FINISHED, "json"), (SCORED, self.format), (REJECTED, "jsonl"))
        for path in (self.path(kind, f"{name}.{suffix}") for kind, suffix in kinds):
            if self.system.exists(path):
                self.system.rm_file(path)

    def finished(self, say: Callable[[str], None] | None = None) -> dict[str, dict[str, Any]]:
        """Return the metadata of the finished shards, by name. A shard with a damaged file is not finished.

        Args:
            say: Called with a line about each damaged shard.
        """
        import pyarrow

        in_parquet = self.format == "parquet"
        kind, suffix = (SCORED, ".parquet") if in_parquet else (FINISHED, ".json")
        finished, base = {}, self.path(kind)
        for path in self.system.find(base):
            if path.endswith(suffix):
                name = path[path.index(base) + len(base) + 1 :].removesuffix(suffix)
                try:
                    about = self._about(path, name) if in_parquet else self._about_lines(path, name)
                except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
                    if say is not None:
                        say(f"{redacted(path)} is damaged, its shard is scored again: {first_line(error)}")
                else:
                    finished.update({} if about is None else {name: about})
        return finished

    def _about(self, path: str, name: str) -> dict[str, Any] | None:
        """Return a finished shard's metadata; None for a file that secateur has not written.

        A local file is read to its end, and the checksum of each page is compared. Of a remote file only the end is read.
        """
        import pyarrow.parquet

        with self.system.open(path, "rb") as raw, pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True) as file:
            metadata = file.metadata.metadata or {}
            if METADATA not in metadata:
                return None
            about = {**json.loads(metadata[METADATA])}
            counts = Counts.from_json(about)
            for batch in file.iter_batches() if self.local else ():
                batch.validate()
            if file.metadata.num_rows != counts.scored:
                raise ValueError(f"expected {counts.scored} rows, got {file.metadata.num_rows}")
        self._require_rejects(name, counts)
        return about

    def _about_lines(self, path: str, name: str) -> dict[str, Any]:
        """Return the metadata of a finished shard of JSONL or CSV.

        The size of its scores is compared, and the checksum of a local file.
        """
        about = {**json.loads(self.system.cat_file(path))}
        counts, scored = Counts.from_json(about), self.path(SCORED, f"{name}.{self.format}")
        expected, size = about["file"], self.system.info(scored)["size"]
        if size != expected["bytes"]:
            raise ValueError(f"expected {expected['bytes']} bytes, got {size}")
        if self.local:
            checksum = 0
            with self.system.open(scored, "rb") as file:
                while block := file.read(1 << 20):
                    checksum = zlib.crc32(block, checksum)
            if checksum != expected["crc32"]:
                raise ValueError("the checksum of its scores is another one")
        self._require_rejects(name, counts)
        return about

    def _require_rejects(self, name: str, counts: Counts) -> None:
        """Raise ValueError if a finished shard's rejected rows are not there."""
        rejects = self.path(REJECTED, f"{name}.jsonl")
        if counts.rejected and not self.system.exists(rejects):
            raise ValueError(f"expected {counts.rejected} rejected rows in {rejects}, got no such file")


class ShardWriter:
    """Writes the files of one shard.

    They get their final names in `close`, first the rejects, then the scores, and then the metadata where it has a file. So a
    shard whose metadata exists is finished.

    Args:
        folder: The output folder.
        name: The shard's name.
        schema: The schema of its scores.
        labels: The candidate labels.
        identity: The columns that are carried over.
    """

    def __init__(
        self, folder: Folder, name: str, schema: pyarrow.Schema, labels: Sequence[str] = (), identity: Identity = None
    ) -> None:
        self._folder, self._name, self._labels, self._kept = folder, name, labels, column_names(identity)
        self.counts = Counts()
        self._scored, self._rejected = f"{name}.{folder.format}", f"{name}.jsonl"
        self._rejects: Any = None
        self._file = self._open(SCORED, self._scored)
        self._table = (
            _ParquetTable(self._file, schema) if folder.format == "parquet" else _LinesTable(self._file, schema, folder)
        )

    def add(self, window: Window, batch: pyarrow.RecordBatch) -> None:
        """Write the rows of a window. `batch` holds its scored rows."""
        self.counts += replace(Counts.of(window), labels=label_counts(batch, self._labels, window.kind))
        if batch.num_rows:
            self._table.write(batch)
        for k, reason in enumerate(window.reasons):
            if reason is not None:
                self._rejects = self._rejects or self._open(REJECTED, self._rejected)
                kept = dict(zip(self._kept, window.kept[k], strict=True))
                about = kept if len(kept) > 1 else {"id": next(iter(kept.values()), None)}
                row = {"row": window.first + k, **about, "reason": reason}
                self._rejects.write(json.dumps(row, default=str).encode() + b"\n")

    def close(self, about: Mapping[str, Any]) -> None:
        """Finish the shard, with `about` and the counts as its metadata."""
        aside = self._table.close({**about, **asdict(self.counts)})
        if self._rejects is not None:
            self._finish(self._rejects, REJECTED, self._rejected)
        elif self._folder.system.exists(self._folder.path(REJECTED, self._rejected)):
            self._folder.system.rm_file(self._folder.path(REJECTED, self._rejected))
        self._finish(self._file, SCORED, self._scored)
        if aside is not None:
            file = self._open(FINISHED, f"{self._name}.json")
            file.write(json.dumps(aside).encode())
            self._finish(file, FINISHED, f"{self._name}.json")

    def abort(self) -> None:
        """Remove the half-written files."""
        self._table.abort()
        for file, kind, name in ((self._file, SCORED, self._scored), (self._rejects, REJECTED, self._rejected)):
            if file is not None:
                # The first error is reported already, and the disk may still be full.
                with contextlib.suppress(OSError):
                    file.close()
                partial = self._folder.partial(kind, name)
                if self._folder.system.exists(partial):
                    self._folder.system.rm_file(partial)

    def _open(self, kind: str, name: str) -> Any:
        """Open a file under its partial name."""
        path = self._folder.partial(kind, name)
        self._folder.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        return self._folder.create(path)

    def _finish(self, file: Any, kind: str, name: str) -> None:
        """Close a file, and give it its final name."""
        if self._folder.local:
            file.flush()
            os.fsync(file.fileno())
        file.close()
        self._folder.rename(self._folder.partial(kind, name), self._folder.path(kind, name))


class _ParquetTable:
    """Writes scored rows to an open Parquet file, which also holds their metadata."""

    def __init__(self, file: Any, schema: pyarrow.Schema) -> None:
        import pyarrow.parquet

        self._writer = pyarrow.parquet.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)

    def write(self, batch: pyarrow.RecordBatch) -> None:
        """Write rows."""
        self._writer.write_batch(batch)

    def close(self, about: Mapping[str, Any]) -> None:
        """Write the metadata and the end of the file."""
        self._writer.add_key_value_metadata({METADATA: json.dumps(about)})
        self._writer.close()

    def abort(self) -> None:
        """Write no more: else the writer would write the end of the file when Python deletes it."""
        self._writer.is_open = False


class _LinesTable:
    """Writes scored rows to an open file of JSONL or CSV.

    A list is JSON in a CSV file. JSON has no NaN and no inf: they are null there.
    """

    def __init__(self, file: Any, schema: pyarrow.Schema, folder: Folder) -> None:
        self._file, self._format = file, folder.format
        self._bytes = self._checksum = 0
        if self._format == "csv":
            self._write_csv([schema.names])

    def write(self, batch: pyarrow.RecordBatch) -> None:
        """Write rows."""
        if self._format == "csv":
            self._write_csv([[_csv_value(value) for value in row.values()] for row in batch.to_pylist()])
        else:
            rows = ({name: _json_value(value) for name, value in row.items()} for row in batch.to_pylist())
            self._write("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))

    def close(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata, which needs a file of its own, with the size and the checksum of this file."""
        return {**about, "file": {"bytes": self._bytes, "crc32": self._checksum}}

    def abort(self) -> None:
        """Write no more."""

    def _write_csv(self, rows: Sequence[Sequence[Any]]) -> None:
        """Write rows of CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._write(text.getvalue())

    def _write(self, text: str) -> None:
        """Write text."""
        content = text.encode()
        self._file.write(content)
        self._bytes, self._checksum = self._bytes + len(content), zlib.crc32(content, self._checksum)


def _csv_value(value: Any) -> Any:
    """A value as a field of CSV."""
    nested = isinstance(value, (list, dict))
    return json.dumps(_json_value(value), ensure_ascii=False, default=str) if nested else value


def _json_value(value: Any) -> Any:
    """A value that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _json_value(of_name) for name, of_name in value.items()}
    return [_json_value(one) for one in value] if isinstance(value, list) else value
