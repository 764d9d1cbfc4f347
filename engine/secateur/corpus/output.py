"""What is written of a shard: a Parquet file with a row for each row that was scored, and a file of those that were not."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.corpus.windows import Window

if TYPE_CHECKING:
    import pyarrow

METADATA = b"secateur"
SCORED, REJECTED = "shards", "rejects"


@dataclass(frozen=True)
class Counts:
    """Rows of a shard: all, those with a score, and those without; tokens without padding, and with it."""

    rows: int = 0
    scored: int = 0
    rejected: int = 0
    tokens: int = 0
    padded: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Counts:
        return cls(*(found[field.name] for field in fields(cls)))

    @classmethod
    def of(cls, window: Window) -> Counts:
        rows = len(window.reasons)
        return cls(rows, window.scored, rows - window.scored, window.tokens, window.padded)


def schema_of(labels: Sequence[str], identity: str | None, window: Window) -> pyarrow.Schema:
    """row: the row's position in its shard, from 0; the identity's own column, of the window's type; label: the most likely
    one; p_<label>: its probability among the labels, float32."""
    import pyarrow

    fields = [("row", pyarrow.int64())]
    if identity is not None:
        kind = pyarrow.array(window.identities).type
        fields.append((identity, pyarrow.string() if pyarrow.types.is_null(kind) else kind))
    fields.append(("label", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())))
    return pyarrow.schema([*fields, *((f"p_{label}", pyarrow.float32()) for label in labels)])


def record_batch(window: Window, labels: Sequence[str], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """The rows of a scored window that have scores. schema: as `schema_of` made it, for this window or its shard's first."""
    import pyarrow

    rows = [k for k, reason in enumerate(window.reasons) if reason is None]
    likely = window.probabilities()[rows]
    best = pyarrow.array(likely.argmax(1).astype(np.int32))
    columns = [pyarrow.array([window.first + k for k in rows], pyarrow.int64())]
    if len(schema) == len(labels) + 3:  # With an identity.
        columns.append(pyarrow.array([window.identities[k] for k in rows], schema.field(1).type))
    columns.append(pyarrow.DictionaryArray.from_arrays(best, pyarrow.array(list(labels))))
    columns += [pyarrow.array(of_label.astype(np.float32)) for of_label in likely.T]
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def with_reasons(batch: pyarrow.RecordBatch, window: Window, identity: str | None = None) -> pyarrow.RecordBatch:
    """All rows of the window in place of those with scores alone: the others have nulls, and a reason why."""
    import pyarrow

    place = iter(range(batch.num_rows))
    rows = pyarrow.array([next(place) if reason is None else None for reason in window.reasons], pyarrow.int64())
    made = batch.take(rows)
    made = made.set_column(0, "row", pyarrow.array(range(window.first, window.first + len(window.reasons)), pyarrow.int64()))
    if identity is not None:
        made = made.set_column(1, identity, pyarrow.array(window.identities, made.schema.field(1).type))
    return made.append_column("reason", pyarrow.array(window.reasons, pyarrow.string()))


class Folder:
    """The output, a local folder or a URL that fsspec knows: SCORED/<shard>.parquet, REJECTED/<shard>.jsonl, and files of the
    run beside them."""

    def __init__(self, place: str) -> None:
        import fsspec

        self.place = place
        self.system, self.root = fsspec.core.url_to_fs(place)
        self.local = "file" in self.system.protocol and "://" not in place
        self._writer = ""

    def written_by(self, writer: str) -> Folder:
        """The same folder for one of several writers, who do not share their half-written files."""
        found = copy.copy(self)
        found._writer = f".{writer}"
        return found

    def path(self, *names: str) -> str:
        return "/".join((self.root.rstrip("/"), *names))

    def names(self) -> list[str]:
        """What lies in it; nothing where it does not exist."""
        if not self.system.exists(self.root):
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in self.system.ls(self.root, detail=False)]

    def read(self, name: str) -> str | None:
        """A file of the run, or None."""
        path = self.path(name)
        return self.system.cat_file(path).decode() if self.system.exists(path) else None

    def write(self, name: str, text: str) -> None:
        """A file of the run, whole or not at all."""
        self.system.makedirs(self.root, exist_ok=True)
        with self.system.open(self.partial(name), "wb") as file:
            file.write(text.encode())
        self.system.mv(self.partial(name), self.path(name))

    def partial(self, *names: str) -> str:
        """Where a file is written before it gets its name; readers of the folder pass by names that begin with a point."""
        *folders, name = "/".join(names).split("/")
        return self.path(*folders, f".{name}{self._writer}.partial")

    def sweep(self) -> None:
        """Removes what killed runs left half-written."""
        for kind in (SCORED, REJECTED):
            for path in self.system.find(self.path(kind)):
                if path.endswith(".partial"):
                    self.system.rm_file(path)

    def finished(self) -> dict[str, dict[str, Any]]:
        """What is said of each shard that is finished, by its name."""
        import pyarrow.parquet

        found, base = {}, self.path(SCORED)
        for path in self.system.find(base):
            if path.endswith(".parquet"):
                with self.system.open(path, "rb") as file:
                    metadata = pyarrow.parquet.read_metadata(file).metadata or {}
                if METADATA in metadata:
                    found[path[path.index(base) + len(base) + 1 :].removesuffix(".parquet")] = json.loads(metadata[METADATA])
        return found


class ShardWriter:
    """One shard's files. They get their names in `close`, the rejects first and the scores last: a shard whose scores are there
    is finished."""

    def __init__(self, folder: Folder, name: str, schema: pyarrow.Schema) -> None:
        import pyarrow.parquet

        self._folder, self._name = folder, name
        self.counts = Counts()
        self._scored, self._rejected = f"{name}.parquet", f"{name}.jsonl"
        self._rejects: Any = None
        self._file = self._open(SCORED, self._scored)
        self._writer = pyarrow.parquet.ParquetWriter(self._file, schema, compression="zstd")

    def add(self, window: Window, batch: pyarrow.RecordBatch) -> None:
        """A window's rows."""
        self.counts += Counts.of(window)
        if batch.num_rows:
            self._writer.write_batch(batch)
        for k, reason in enumerate(window.reasons):
            if reason is not None:
                self._rejects = self._rejects or self._open(REJECTED, self._rejected)
                row = {"row": window.first + k, "id": window.identities[k], "reason": reason}
                self._rejects.write(json.dumps(row, default=str).encode() + b"\n")

    def close(self, about: Mapping[str, Any]) -> None:
        """The shard is finished; `about` goes into the Parquet file's metadata, with the counts."""
        self._writer.add_key_value_metadata({METADATA: json.dumps({**about, **asdict(self.counts)})})
        self._writer.close()
        if self._rejects is not None:
            self._settle(self._rejects, REJECTED, self._rejected)
        elif self._folder.system.exists(self._folder.path(REJECTED, self._rejected)):
            self._folder.system.rm_file(self._folder.path(REJECTED, self._rejected))
        self._settle(self._file, SCORED, self._scored)

    def abort(self) -> None:
        """Leaves nothing."""
        self._writer.is_open = False  # Or it would write its footer when it is collected.
        for file, kind, name in ((self._file, SCORED, self._scored), (self._rejects, REJECTED, self._rejected)):
            if file is not None:
                # What is wrong has been said already; the disk may still be full.
                with contextlib.suppress(OSError):
                    file.close()
                partial = self._folder.partial(kind, name)
                if self._folder.system.exists(partial):
                    self._folder.system.rm_file(partial)

    def _open(self, kind: str, name: str) -> Any:
        path = self._folder.partial(kind, name)
        self._folder.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        return self._folder.system.open(path, "wb")

    def _settle(self, file: Any, kind: str, name: str) -> None:
        if self._folder.local:
            file.flush()
            os.fsync(file.fileno())
        file.close()
        source, target = self._folder.partial(kind, name), self._folder.path(kind, name)
        if self._folder.local:
            os.replace(source, target)
        else:
            self._folder.system.mv(source, target)
