"""Shards scored one after the other, each into its own files; what goes wrong in one is said and the next ones go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.corpus.output import Counts, Folder, ShardWriter, record_batch, schema_of
from secateur.corpus.pipeline import Runner, scored
from secateur.corpus.sources import ShardError, Source
from secateur.corpus.windows import Window, windows
from secateur.support.errors import first_line


@dataclass(frozen=True)
class Reading:
    """Which columns of a corpus are read, and what becomes of inputs that are longer than the model takes: "cut", or rejected
    by "error". limit: rows of all shards together, at most."""

    column: str = "text"
    identity: str | None = None
    on_long: str = "cut"
    limit: int | None = None


@dataclass(frozen=True)
class Finished:
    """A shard that was scored, or why it was not."""

    source: Source
    counts: Counts
    error: str | None = None


@dataclass(frozen=True)
class _Begin:
    source: Source


@dataclass(frozen=True)
class _End:
    source: Source
    error: str | None = None


About = Callable[[Source], dict[str, Any]]
Progress = Callable[[Source, float, Counts], None]
Engine = Callable[[Runner, Sequence[Source], Folder, Reading, About, Progress | None], Iterator[Finished]]


def score_shards(
    runner: Runner,
    sources: Sequence[Source],
    folder: Folder,
    reading: Reading,
    about: About,
    progress: Progress | None = None,
) -> Iterator[Finished]:
    """Scores the sources in order. about: what is kept of each in its file's metadata. progress: called after each window with
    the source, the share of it that is done, and the window's counts. While one shard is written the next is read."""
    labels = runner.task.label_names(runner.model)
    lost: set[str] = set()
    with contextlib.closing(_Output(folder, reading, labels, about)) as output:
        for event in scored(_events(runner, sources, reading, len(labels), lost), runner):
            if isinstance(event, _Begin):
                output.begin(event.source)
            elif isinstance(event, _End):
                yield output.end(event.error)
            elif output.error is None:
                output.add(event)
                if output.error is not None:
                    lost.add(output.source.name)
                elif progress is not None:
                    progress(output.source, event.share, Counts.of(event))


def _events(
    runner: Runner, sources: Sequence[Source], reading: Reading, labels: int, lost: Collection[str]
) -> Iterator[_Begin | Window | _End]:
    """Each source's windows between its beginning and its end. lost: sources whose further windows nobody wants."""
    left = reading.limit
    for source in sources:
        if left == 0:
            break
        yield _Begin(source)
        error = None
        chunks = source.read(reading.column, reading.identity)
        try:
            for window in windows(
                chunks, runner.task, labels, max_tokens=runner.max_tokens, on_long=reading.on_long, limit=left
            ):
                yield window
                if left is not None:
                    left -= len(window.reasons)
                if source.name in lost:
                    break
        except ShardError as found:
            error = str(found)
        yield _End(source, error)


class _Output:
    """The files of the shard that is under way."""

    def __init__(self, folder: Folder, reading: Reading, labels: Sequence[str], about: About) -> None:
        self._folder, self._reading, self._labels, self._about = folder, reading, labels, about
        self._writer: ShardWriter | None = None
        self._schema: Any = None
        self.error: str | None = None
        self.source: Source

    def begin(self, source: Source) -> None:
        self.source, self.error = source, None

    def add(self, window: Window) -> None:
        """Writes a window; `error` says if it could not."""
        try:
            if self._writer is None:
                self._schema = schema_of(self._labels, self._reading.identity, window)
                self._writer = ShardWriter(self._folder, self.source.name, self._schema)
            self._writer.add(window, record_batch(window, self._labels, self._schema))
        except (OSError, ValueError) as found:  # Arrow's own errors are among them.
            self._fail(found)

    def end(self, error: str | None) -> Finished:
        """Gives the files their names, unless something went wrong."""
        self.error = self.error or error
        counts = Counts()
        if self.error is None and self._writer is not None:
            try:
                self._writer.close(self._about(self.source))
                counts, self._writer = self._writer.counts, None
            except OSError as found:
                self._fail(found)
        self.close()
        return Finished(self.source, counts, self.error)

    def close(self) -> None:
        """Leaves nothing half-written."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None

    def _fail(self, error: Exception) -> None:
        what = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        self.error = f"{self.source.place}: its scores cannot be written: {what}"
        self.close()
