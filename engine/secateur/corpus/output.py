"""The files of a shard: a Parquet file with a row for each scored document, and a JSONL file of the rejected ones."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.corpus.windows import Window
from secateur.support.errors import InputError, first_line
from secateur.support.files import create_own, require_run_folder
from secateur.support.urls import redacted
from secateur.tasks.model_config import OutputKind

if TYPE_CHECKING:
    import pyarrow

METADATA = b"secateur"
SCORED, REJECTED = "shards", "rejects"


@dataclass(frozen=True)
class Counts:
    """Counts of a shard or of a corpus.

    Attributes:
        rows: All rows.
        scored: Rows with a score.
        rejected: Rows without a score.
        tokens: Tokens without padding.
        padded: Tokens with padding.
    """

    rows: int = 0
    scored: int = 0
    rejected: int = 0
    tokens: int = 0
    padded: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Counts:
        """Read the counts from a mapping that has all of them, and perhaps more."""
        return cls(*(document[field.name] for field in fields(cls)))

    @classmethod
    def of(cls, window: Window) -> Counts:
        """Return the counts of a scored window."""
        rows = len(window.reasons)
        return cls(rows, window.scored, rows - window.scored, window.tokens, window.padded)


def output_names(labels: Sequence[str], kind: OutputKind) -> list[str]:
    """Return the names of the columns that tell a row's result.

    They are label and p_<label>; labels and p_<label> where any number of labels is right; or value.
    """
    return ["value"] if kind == "value" else [kind, *(f"p_{label}" for label in labels)]


def schema_of(labels: Sequence[str], identity: str | None, window: Window) -> pyarrow.Schema:
    """Return the Arrow schema of scored rows.

    Its columns are row (int64, the position in the file, from 0), the identity's column, if there is one, with the type that
    identities have in the shard, and the result. The result is label (the most likely label) and p_<label> (float32, the
    label's probability among the labels). Where any number of labels is right, it is labels (a list of those with a probability
    above 0.5) and p_<label> (each label's own probability). A model with one output has value (float32) alone.
    """
    import pyarrow

    fields = [("row", pyarrow.int64())]
    if identity is not None:
        fields.append((identity, window.identity_type))
    types = {"label": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), "labels": pyarrow.list_(pyarrow.string())}
    return pyarrow.schema(
        [*fields, *((name, types.get(name, pyarrow.float32())) for name in output_names(labels, window.kind))]
    )


def require_free_name(identity: str | None, labels: Sequence[str], kind: OutputKind) -> None:
    """Check that the identity's column has another name than the columns of the scores.

    Raises:
        InputError: It has not.
    """
    taken = ("row", *output_names(labels, kind), "reason")
    if identity in taken:
        raise InputError(f"id-column: expected another name than those of the scores ({', '.join(taken)}), got {identity!r}")


def record_batch(window: Window, labels: Sequence[str], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """Return the rows of a scored window that have scores.

    Args:
        window: The window.
        labels: The candidate labels.
        schema: The schema, from `schema_of`, for this window or for the first window of its shard.
    """
    import pyarrow

    rows = [k for k, reason in enumerate(window.reasons) if reason is None]
    probabilities = window.probabilities()[rows]  # [scored rows, labels]
    columns = [pyarrow.array([window.first + k for k in rows], pyarrow.int64())]
    if len(schema) == len(output_names(labels, window.kind)) + 2:  # The schema has an identity column.
        columns.append(pyarrow.array([window.identities[k] for k in rows], schema.field(1).type))
    if window.kind == "label":
        best = pyarrow.array(probabilities.argmax(1).astype(np.int32))
        columns.append(pyarrow.DictionaryArray.from_arrays(best, pyarrow.array(list(labels))))
    elif window.kind == "labels":
        above = [[label for label, p in zip(labels, of_row, strict=True) if p > 0.5] for of_row in probabilities.tolist()]
        columns.append(pyarrow.array(above, pyarrow.list_(pyarrow.string())))
    columns += [pyarrow.array(of_label.astype(np.float32)) for of_label in probabilities.T]
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def with_reasons(batch: pyarrow.RecordBatch, window: Window, identity: str | None = None) -> pyarrow.RecordBatch:
    """Extend a record batch to all rows of its window. Rejected rows get nulls, and the new column `reason` says why.

    Args:
        batch: The scored rows, from `record_batch`.
        window: The window.
        identity: The name of the identity's column.
    """
    import pyarrow

    position = iter(range(batch.num_rows))
    rows = pyarrow.array([next(position) if reason is None else None for reason in window.reasons], pyarrow.int64())
    extended = batch.take(rows)
    extended = extended.set_column(
        0, "row", pyarrow.array(range(window.first, window.first + len(window.reasons)), pyarrow.int64())
    )
    if identity is not None:
        extended = extended.set_column(1, identity, pyarrow.array(window.identities, extended.schema.field(1).type))
    return extended.append_column("reason", pyarrow.array(window.reasons, pyarrow.string()))


class Folder:
    """The output folder: SCORED/<shard>.parquet, REJECTED/<shard>.jsonl, and the run's own files beside them.

    Args:
        place: A local folder, or a URL that fsspec knows.

    Raises:
        InputError: The URL's kind is unknown, or its package is not installed.
    """

    def __init__(self, place: str) -> None:
        import fsspec

        self.place = place
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
        for kind in (SCORED, REJECTED):
            for path in self.system.find(self.path(kind)):
                if path.endswith(".partial"):
                    self.system.rm_file(path)

    def remove(self, name: str) -> None:
        """Remove the files of a finished shard."""
        for path in (self.path(SCORED, f"{name}.parquet"), self.path(REJECTED, f"{name}.jsonl")):
            if self.system.exists(path):
                self.system.rm_file(path)

    def finished(self, say: Callable[[str], None] | None = None) -> dict[str, dict[str, Any]]:
        """Return the metadata of the finished shards, by name. A shard with a damaged file is not finished.

        Args:
            say: Called with a line about each damaged shard.
        """
        import pyarrow

        finished, base = {}, self.path(SCORED)
        for path in self.system.find(base):
            if path.endswith(".parquet"):
                name = path[path.index(base) + len(base) + 1 :].removesuffix(".parquet")
                try:
                    about = self._about(path, name)
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
        rejects = self.path(REJECTED, f"{name}.jsonl")
        if counts.rejected and not self.system.exists(rejects):
            raise ValueError(f"expected {counts.rejected} rejected rows in {rejects}, got no such file")
        return about


class ShardWriter:
    """Writes the files of one shard.

    They get their final names in `close`, first the rejects and then the scores. So a shard whose scores exist is finished.

    Args:
        folder: The output folder.
        name: The shard's name.
        schema: The schema of its scores.
    """

    def __init__(self, folder: Folder, name: str, schema: pyarrow.Schema) -> None:
        import pyarrow.parquet

        self._folder, self._name = folder, name
        self.counts = Counts()
        self._scored, self._rejected = f"{name}.parquet", f"{name}.jsonl"
        self._rejects: Any = None
        self._file = self._open(SCORED, self._scored)
        self._writer = pyarrow.parquet.ParquetWriter(self._file, schema, compression="zstd", write_page_checksum=True)

    def add(self, window: Window, batch: pyarrow.RecordBatch) -> None:
        """Write the rows of a window. `batch` holds its scored rows."""
        self.counts += Counts.of(window)
        if batch.num_rows:
            self._writer.write_batch(batch)
        for k, reason in enumerate(window.reasons):
            if reason is not None:
                self._rejects = self._rejects or self._open(REJECTED, self._rejected)
                row = {"row": window.first + k, "id": window.identities[k], "reason": reason}
                self._rejects.write(json.dumps(row, default=str).encode() + b"\n")

    def close(self, about: Mapping[str, Any]) -> None:
        """Finish the shard. `about` and the counts go into the metadata of the Parquet file."""
        self._writer.add_key_value_metadata({METADATA: json.dumps({**about, **asdict(self.counts)})})
        self._writer.close()
        if self._rejects is not None:
            self._finish(self._rejects, REJECTED, self._rejected)
        elif self._folder.system.exists(self._folder.path(REJECTED, self._rejected)):
            self._folder.system.rm_file(self._folder.path(REJECTED, self._rejected))
        self._finish(self._file, SCORED, self._scored)

    def abort(self) -> None:
        """Remove the half-written files."""
        self._writer.is_open = False  # Else it would write its footer when Python deletes it.
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
