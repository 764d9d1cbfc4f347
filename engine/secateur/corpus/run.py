"""A whole corpus into a folder: what is finished stays, what is not is done, and the counts add up."""

from __future__ import annotations

import contextlib
import json
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
from secateur.corpus.tuning import FEWEST, Say, tuned, untuned
from secateur.corpus.windows import windows
from secateur.errors import InputError
from secateur.files import require_parent
from secateur.ledger import require_alone, require_same
from secateur.tasks import Item

SETTINGS, SUMMARY = "settings.json", "summary.json"


@dataclass(frozen=True)
class Summary:
    """counts: of all shards that are finished, those of earlier runs too. failed: why others are not. here, seconds, busy: this
    run's counts, how long it took, and the share of that which its workers spent in the model."""

    counts: Counts
    here: Counts
    shards: int
    failed: list[str]
    seconds: float
    busy: float
    settings: dict[str, Any]

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
        }


@dataclass(frozen=True)
class Wanted:
    """How the model shall be run: None is for what is measured at the start."""

    max_tokens: int | None = None
    threads: int | None = None
    any_dtype: bool = False


class Job:
    """A corpus on its way into a folder.

    settings: what the scores depend on; a folder that was begun with others is refused. Raises InputError: that; a folder
    that exists, unless `resume`, or lies nowhere; a first shard without the column.
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
        self.finished = {} if self._began is None else folder.finished()

    @property
    def left(self) -> list[Source]:
        """The sources that are not finished, or have another size than when they were."""
        return [source for source in self.sources if self.finished.get(source.name, {}).get("size") != source.size]

    def ready(self, model: Runner, wanted: Wanted, say: Say) -> Runner:
        """The model as it is to be run: as this folder's first run found out, or measured now."""
        if self._began is not None:
            found = json.loads(self._began)["tuned"]
            say(f"as begun: {', '.join(f'{name} {value}' for name, value in found.items())}")
            return as_tuned(model, found)
        options = {"max_tokens": wanted.max_tokens, "threads": wanted.threads}
        items = self._sample(untuned(model, **options)) if None in options.values() or wanted.any_dtype else []
        if len(items) < FEWEST:
            return untuned(model, **options)
        return tuned(model, items, any_dtype=wanted.any_dtype, say=say, **options)

    def begin(self, model: Runner) -> None:
        """Writes down what the run is about, and clears away what killed ones left."""
        self.tuned = tuned_as(model)
        if self._began is None:
            self.folder.write(SETTINGS, json.dumps({"settings": self.settings, "tuned": self.tuned}, indent=1) + "\n")
        self.folder.sweep()

    def run(self, model: Runner, finished: Iterator[Finished]) -> Iterator[Finished]:
        """Passes the finished shards on, and writes the summary once there are no more."""
        began, busy, here, failed = time.perf_counter(), model.busy, Counts(), []
        for each in finished:
            here += each.counts
            if each.error is None:
                self.finished[each.source.name] = asdict(each.counts)
            else:
                failed.append(each.error)
            yield each
        seconds = time.perf_counter() - began
        counts = sum((Counts.from_json(about) for about in self.finished.values()), Counts())
        share = (model.busy - busy) / (seconds * model.workers) if seconds else 0.0
        self.summary = Summary(counts, here, len(self.finished), failed, seconds, share, {**self.settings, **self.tuned})
        self.folder.write(SUMMARY, json.dumps(self.summary.to_json(), indent=1) + "\n")

    def score(self, model: Runner, progress: Progress | None = None, engine: Engine = score_shards) -> Iterator[Finished]:
        """Scores what is left."""
        return self.run(model, engine(model, self.left, self.folder, self._rest, about, progress))

    @property
    def _rest(self) -> Reading:
        """A limit is for the whole corpus."""
        if self.reading.limit is None:
            return self.reading
        return replace(self.reading, limit=self.reading.limit - sum(each["rows"] for each in self.finished.values()))

    def _sample(self, model: Runner) -> list[Item]:
        """Some of the corpus's items."""
        labels = len(model.task.label_names(model.model))
        found: list[Item] = []
        for source in self.sources:
            chunks = source.read(self.reading.column, self.reading.identity)
            try:
                for window in windows(chunks, model.task, labels, max_tokens=model.max_tokens, on_long="cut"):
                    found += window.items
                    if len(found) >= 4 * FEWEST:
                        return found
            except ShardError:
                continue  # The run will say so.
        return found


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


def tuned_as(model: Runner) -> dict[str, Any]:
    """How the model is run, as JSON knows it."""
    found = {"max_tokens": model.max_tokens, "workers": model.workers, "threads": model.threads}
    return {**found, "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch.")}


def as_tuned(model: Runner, tuned: Mapping[str, Any]) -> Runner:
    """The model as `tuned_as` found another one to be run, in an earlier run or another process."""
    options = {name: value for name, value in tuned.items() if name != "dtype"}
    dtype = getattr(torch, tuned["dtype"])
    # Only if it has to be: a model that was loaded in that dtype may hold single parameters in a wider one.
    same = next(model.model.parameters()).dtype == dtype
    return replace(model, model=model.model if same else model.model.to(dtype), **options)
