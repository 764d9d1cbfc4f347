"""Score shards one after the other, each into its own files. An error in one shard is reported, and the next one follows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.corpus.output import Counts, Folder, ShardWriter, record_batch, schema_of
from secateur.corpus.pipeline import Runner, scored
from secateur.corpus.sources import Identity, ShardError, Source
from secateur.corpus.windows import Window, windows
from secateur.support.errors import first_line
from secateur.support.urls import redacted


@dataclass(frozen=True)
class Reading:
    """How a corpus is read.

    Attributes:
        column: The column of the input, or the columns of its texts.
        identity: The columns to carry over into the result: none, one (a text), or several.
        on_long: What happens to inputs that are longer than the model takes: "cut", or "error" to reject them.
        limit: The most rows of all shards together.
    """

    column: str | Sequence[str] = "text"
    identity: Identity = None
    on_long: str = "cut"
    limit: int | None = None


@dataclass(frozen=True)
class Finished:
    """A shard after scoring.

    Attributes:
        source: The shard.
        counts: Its counts.
        error: Why it was not scored; None if it was.
    """

    source: Source
    counts: Counts
    error: str | None = None


@dataclass(frozen=True)
class _Begin:
    """A shard begins."""

    source: Source


@dataclass(frozen=True)
class _End:
    """A shard ends, perhaps with an error."""

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
    """Score shards in order. While one shard is written, the next one is read.

    Args:
        runner: The model, and how it is run.
        sources: The shards.
        folder: The output folder.
        reading: How the shards are read.
        about: Returns the metadata that a finished shard's file keeps of its source.
        progress: Called after each window with the shard, the share of it that is done, and the window's counts.
    """
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
    """The windows of each shard, between its beginning and its end. No more windows of the shards in `lost` are read."""
    left = reading.limit
    for source in sources:
        if left == 0:
            break
        yield _Begin(source)
        error = None
        chunks = source.read(reading.column, reading.identity)
        bounds: dict[str, Any] = {"max_tokens": runner.max_tokens, "limit": left, "first": source.first}
        try:
            for window in windows(chunks, runner.task, runner.model, labels, on_long=reading.on_long, **bounds):
                yield window
                if left is not None:
                    left -= len(window.reasons)
                if source.name in lost:
                    break
        except ShardError as raised:
            error = str(raised)
        yield _End(source, error)


class _Output:
    """Writes the files of the current shard."""

    def __init__(self, folder: Folder, reading: Reading, labels: Sequence[str], about: About) -> None:
        self._folder, self._reading, self._labels, self._about = folder, reading, labels, about
        self._writer: ShardWriter | None = None
        self._schema: Any = None
        self.error: str | None = None
        self.source: Source

    def begin(self, source: Source) -> None:
        """Begin a shard. Its files are created with its first window."""
        self.source, self.error = source, None

    def add(self, window: Window) -> None:
        """Write a window. On failure, `error` is set."""
        try:
            if self._writer is None:
                self._schema = schema_of(self._labels, self._reading.identity, window)
                identity = self._reading.identity
                self._writer = ShardWriter(self._folder, self.source.name, self._schema, self._labels, identity)
            self._writer.add(window, record_batch(window, self._labels, self._schema))
        except (OSError, ValueError) as error:  # Arrow's errors are OSErrors and ValueErrors.
            self._fail(error)

    def end(self, error: str | None) -> Finished:
        """Give the files their final names, unless an error occurred."""
        self.error = self.error or error
        counts = Counts()
        if self.error is None and self._writer is not None:
            try:
                self._writer.close(self._about(self.source))
                counts, self._writer = self._writer.counts, None
            except OSError as raised:
                self._fail(raised)
        self.close()
        return Finished(self.source, counts, self.error)

    def close(self) -> None:
        """Remove half-written files."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None

    def _fail(self, error: Exception) -> None:
        """Record an error, and remove the shard's files."""
        cause = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        self.error = redacted(f"{self.source.place}: its scores cannot be written: {cause}")
        self.close()
