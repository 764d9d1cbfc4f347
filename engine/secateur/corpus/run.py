"""A whole corpus into a folder: what is finished stays, what is not is done, and the counts add up."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from secateur.corpus.output import Counts, Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.shards import Engine, Finished, Progress, Reading, score_shards
from secateur.corpus.sources import ColumnError, ShardError, Source, no_column
from secateur.corpus.tuning import FEWEST, Sample, Say, tuned, untuned
from secateur.corpus.windows import windows
from secateur.support.errors import InputError
from secateur.support.files import require_parent
from secateur.support.ledger import require_alone, require_same
from secateur.tasks import Item

SETTINGS, SUMMARY = "settings.json", "summary.json"


@dataclass(frozen=True)
class Summary:
    """counts: of all shards that are finished, those of earlier runs too. failed: why others are not. here, seconds, busy: this
    run's counts, how long it took, and the share of that which its workers spent in the model. measured: what was found out
    when the folder was begun of how the model is run fastest."""

    counts: Counts
    here: Counts
    shards: int
    failed: list[str]
    seconds: float
    busy: float
    settings: dict[str, Any]
    measured: list[str]

    def to_json(self) -> dict[str, Any]:
        rate = {name: getattr(self.here, name) / max(self.seconds, 1e-9) for name in ("rows", "tokens")}
        return {
            **asdict(self.counts),
            "padding": 1 - self.counts.tokens / self.counts.padded if self.counts.padded else 0.0,
            "shards": self.shards,
            "failed": self.failed,
            "seconds": round(self.seconds, 3),
            "documents_per_second": round(rate["rows"], 2),
            "tokens_per_second": round(rate["tokens"], 1),
            "busy": round(self.busy, 4),
            "settings": self.settings,
            "measured": self.measured,
        }


@dataclass(frozen=True)
class Wanted:
    """How the model shall be run: None is for what is measured at the start (compile: on corpora that are long enough)."""

    max_tokens: int | None = None
    threads: int | None = None
    any_dtype: bool = False
    compile: bool | None = False


class Job:
    """A corpus on its way into a folder.

    settings: what the scores depend on; a folder that was begun with others is refused. Raises InputError: that; a folder
    that exists, unless `resume`, or lies nowhere; a first shard without the column.
    Looking at the folder changes nothing in it. `begin` does, and the rest follows it: all that within `alone_in`.
    """

    def __init__(
        self, sources: Sequence[Source], folder: Folder, reading: Reading, settings: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.sources, self.folder, self.reading = sources, folder, reading
        self.settings = json.loads(json.dumps({**settings, **asdict(reading)}))
        if folder.local:
            require_parent(Path(folder.place))
        self._began = folder.read(SETTINGS)
        if self._began is None and any(not name.startswith(".") for name in folder.names()):
            raise InputError(f"out: expected a new folder, or one that this command began, got {folder.place!r}")
        if self._began is not None:
            if not resume:
                raise InputError(f"out: {folder.place!r} was begun already; --resume goes on with it")
            require_same(folder.place, json.loads(self._began)["settings"], self.settings)
        _require_column(sources[0], reading)
        self.finished: dict[str, dict[str, Any]] = {}
        self._measured: list[str] = []

    @property
    def unnamed(self) -> list[str]:
        """Shards that are finished and are none of the sources: their scores stay, and are counted."""
        return sorted(self.finished.keys() - {source.name for source in self.sources})

    @property
    def left(self) -> list[Source]:
        """The sources that are not finished, or have another size than when they were."""
        return [source for source in self.sources if self.finished.get(source.name, {}).get("size") != source.size]

    def ready(self, runner: Runner, wanted: Wanted, say: Say) -> Runner:
        """The model as it is to be run: as this folder's first run found out, or measured now. Raises InputError as `tuned`."""
        if self._began is not None:
            found = json.loads(self._began)
            self._measured = found.get("measured", [])
            say(f"as begun: {', '.join(f'{name} {value}' for name, value in found['tuned'].items())}")
            return with_tuning(runner, found["tuned"])

        def note(line: str) -> None:
            self._measured.append(line)
            say(line)

        options = {"max_tokens": wanted.max_tokens, "threads": wanted.threads}
        rough = untuned(runner, **options)
        if None not in options.values() and not wanted.any_dtype and wanted.compile is False:
            return rough
        sample = self._sample(rough)
        if len(sample.items) >= FEWEST:
            return tuned(runner, sample, any_dtype=wanted.any_dtype, compile=wanted.compile, say=note, **options)
        if wanted.compile and sample.items:
            return tuned(runner, sample, max_tokens=rough.max_tokens, threads=rough.workers, compile=True, say=note)
        return rough

    def begin(self, runner: Runner) -> None:
        """Writes down what the run is about, and clears away what killed ones left. Raises InputError: another process began
        the folder since this one looked at it; a source has the name of a shard that was scored from another place."""
        if self.folder.read(SETTINGS) != self._began:
            raise InputError(f"out: {self.folder.place!r} was begun by another process just now; --resume goes on with it")
        if self._began is not None:
            self.finished = self.folder.finished()
            _require_places(self.sources, self.finished)
        self.tuned = tuning_of(runner)
        if self._began is None:
            found = {"settings": self.settings, "tuned": self.tuned, "measured": self._measured}
            self.folder.write(SETTINGS, json.dumps(found, indent=1) + "\n")
        self.folder.sweep()

    def run(self, runner: Runner, finished: Iterator[Finished]) -> Iterator[Finished]:
        """Passes the finished shards on, and writes the summary once there are no more."""
        began, busy, here, failed = time.perf_counter(), runner.busy, Counts(), []
        for each in finished:
            here += each.counts
            if each.error is None:
                self.finished[each.source.name] = asdict(each.counts)
            else:
                failed.append(each.error)
            yield each
        seconds = time.perf_counter() - began
        counts = sum((Counts.from_json(about) for about in self.finished.values()), Counts())
        share = (runner.busy - busy) / (seconds * runner.workers) if seconds else 0.0
        settings = {**self.settings, **self.tuned}
        self.summary = Summary(counts, here, len(self.finished), failed, seconds, share, settings, self._measured)
        self.folder.write(SUMMARY, json.dumps(self.summary.to_json(), indent=1) + "\n")

    def score(self, runner: Runner, progress: Progress | None = None, engine: Engine = score_shards) -> Iterator[Finished]:
        """Scores what is left."""
        return self.run(runner, engine(runner, self.left, self.folder, self._rest, about, progress))

    @property
    def _rest(self) -> Reading:
        """A limit is for the whole corpus."""
        if self.reading.limit is None:
            return self.reading
        return replace(self.reading, limit=self.reading.limit - sum(each["rows"] for each in self.finished.values()))

    def _sample(self, runner: Runner) -> Sample:
        """Some of the corpus's items, and by their share of its bytes how many tokens it has."""
        labels = len(runner.task.label_names(runner.model))
        items: list[Item] = []
        read = 0.0
        for source in self.sources:
            chunks, share = source.read(self.reading.column, self.reading.identity), 0.0
            try:
                for window in windows(chunks, runner.task, labels, max_tokens=runner.max_tokens, on_long="cut"):
                    items += window.items
                    share = window.share
                    if len(items) >= 4 * FEWEST:
                        break
            except ShardError:
                pass  # The run will say so.
            read += share * source.size
            if len(items) >= 4 * FEWEST:
                break
        if not (items and read and all(source.size for source in self.sources)):
            return Sample(items)
        tokens = sum(item.length for item in items)
        most = math.inf if self.reading.limit is None else self.reading.limit * tokens / len(items)
        return Sample(items, min(most, tokens * sum(source.size for source in self.sources) / read))


@contextlib.contextmanager
def alone_in(folder: Folder) -> Iterator[None]:
    """Keeps other processes of this machine out of a local folder. Raises InputError if one is there."""
    if not folder.local:
        yield
        return
    Path(folder.root).mkdir(exist_ok=True)
    with open(folder.path(".lock"), "w") as file:
        require_alone(file, folder.place)
        yield


def about(source: Source) -> dict[str, Any]:
    """What a finished shard's file says of where it came from."""
    return {"source": source.place, "size": source.size}


def _require_places(sources: Sequence[Source], finished: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InputError for a source with the name of a shard that was scored from another place: it would be passed by, or
    its scores would replace the others."""
    for source in sources:
        place = finished.get(source.name, {}).get("source", source.place)
        if place != source.place:
            raise InputError(
                f"data: {source.name!r} was scored from {place!r}, got {source.place!r}; another corpus needs a new folder"
            )


def _require_column(source: Source, reading: Reading) -> None:
    """Raises InputError if the first shard does not have the column, nor any of its first rows. Whatever else is wrong with it
    is for the run to say, which then goes on to the others."""
    try:
        rows, _ = next(source.read(reading.column, reading.identity))
    except ColumnError as error:
        raise InputError(f"data: {error}") from error
    except ShardError:
        return
    if rows and all(row.reason == no_column(reading.column) for row in rows):
        raise InputError(f"data: {source.place}: expected the column {reading.column!r}, which none of its first rows has")


def tuning_of(runner: Runner) -> dict[str, Any]:
    """How the model is run, as JSON knows it."""
    found = {name: getattr(runner, name) for name in ("max_tokens", "workers", "threads", "compiled")}
    return {**found, "dtype": str(next(runner.model.parameters()).dtype).removeprefix("torch.")}


def with_tuning(runner: Runner, tuned: Mapping[str, Any]) -> Runner:
    """The runner as `tuning_of` found another one to be run, in an earlier run or another process."""
    options = {name: value for name, value in tuned.items() if name != "dtype"}
    dtype = getattr(torch, tuned["dtype"])
    # Only if it has to be: a model that was loaded in that dtype may hold single parameters in a wider one.
    same = next(runner.model.parameters()).dtype == dtype
    return replace(runner, model=runner.model if same else runner.model.to(dtype), **options)
