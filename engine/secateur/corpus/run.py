"""Score a whole corpus into a folder. Finished shards are kept, unfinished ones are scored, and the counts add up."""

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

from secateur.corpus.openvino_runtime import require_openvino, takes_openvino
from secateur.corpus.output import FORMATS, Counts, Folder, require_free_name
from secateur.corpus.parts import MOST, about_part, cut, finished_parts, may_be_cut, part_rows
from secateur.corpus.pipeline import Runner
from secateur.corpus.shards import Engine, Finished, Progress, Reading, score_shards
from secateur.corpus.sources import ColumnError, Row, ShardError, Source, column_names, no_column
from secateur.corpus.tuning import FEWEST, RUNTIMES, Sample, Say, rows_a_second, tuned, untuned
from secateur.corpus.windows import WRITTEN, windows
from secateur.support.errors import InputError, reading
from secateur.support.files import open_own, require_alone
from secateur.support.ledger import require_same
from secateur.support.urls import redacted

SETTINGS, SUMMARY = "settings.json", "summary.json"


@dataclass(frozen=True)
class Summary:
    """The summary of a run.

    Attributes:
        counts: Counts of all finished shards, those of earlier runs included.
        here: Counts of this run.
        shards: The number of finished shards.
        failed: Why the other shards are not finished.
        seconds: How long this run took.
        busy: The share of this time that the workers spent in the model.
        settings: What the scores depend on, and how the model was run.
        measured: The measurements, made when the folder was begun, of how the model runs fastest.
    """

    counts: Counts
    here: Counts
    shards: int
    failed: list[str]
    seconds: float
    busy: float
    settings: dict[str, Any]
    measured: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as a JSON document, with rates a second and the share of padding."""
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
class RunOptions:
    """How the model is to be run. None means that it is measured at the start.

    Attributes:
        max_tokens: Padded input tokens in a batch.
        threads: CPU threads.
        any_dtype: Whether another dtype may be tried.
        compile: Whether the model is compiled. None: it is measured, on corpora that are long enough.
        runtime: What computes the scores: "torch", "openvino", or "auto", as in `tuned`.
        part_rows: The most rows of a part of a large file. None: they are about `parts.SECONDS` of work, as measured.
    """

    max_tokens: int | None = None
    threads: int | None = None
    any_dtype: bool = False
    compile: bool | None = False
    runtime: str = "torch"
    part_rows: int | None = None


class CorpusRun:
    """The scoring of a corpus into a folder.

    The constructor reads the folder, and changes nothing in it. `begin` writes to it, and scoring follows: call all these
    within `alone_in`.

    Args:
        sources: The shards. `begin` cuts large files into several.
        folder: The output folder.
        reading: How the shards are read.
        settings: What the scores depend on. A folder that was begun with other settings is refused.
        resume: Whether the folder may be one that was begun.

    Raises:
        InputError: The settings differ from the folder's; the folder exists and `resume` is false; its parent does not exist;
            the first shard lacks a column; or the identity's column has the name of one of the scores'.
    """

    def __init__(
        self, sources: Sequence[Source], folder: Folder, reading: Reading, settings: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.sources, self.folder, self.reading = sources, folder, reading
        require_free_name(reading.identity, settings.get("labels", ()), settings.get("outputs", "label"))
        self.settings = json.loads(json.dumps({**settings, **asdict(reading), "format": folder.format}))
        for source in sources:
            folder.require_inside(source.name)
        self._began = folder.read(SETTINGS)
        if self._began is None and any(not name.startswith(".") for name in folder.names()):
            raise InputError(f"out: expected a new folder, or one that this command began, got {folder.place!r}")
        if self._began is not None:
            if not resume:
                raise InputError(f"out: {folder.place!r} was begun already; --resume continues it")
            self._document = _settings_of(folder, self._began)
            require_same(folder.place, self._document["settings"], self.settings)
        _require_column(sources[0], reading)
        self.finished: dict[str, dict[str, Any]] = {}
        self._measured: list[str] = []
        self.part_rows: int | None = None  # None: no file is cut.

    @property
    def unnamed(self) -> list[str]:
        """Finished shards that are not among the sources. Their scores are kept, and are counted."""
        return sorted(self.finished.keys() - {source.name for source in self.sources})

    @property
    def left(self) -> list[Source]:
        """The sources that are not finished, or have changed since they were."""
        return [source for source in self.sources if not _same(source, self.finished.get(source.name))]

    def ready(self, runner: Runner, options: RunOptions, say: Say) -> Runner:
        """Return the runner with its settings: as this folder's first run had them, or measured now.

        Args:
            runner: The model.
            options: How it is to be run.
            say: Called with a line about each measurement.

        Raises:
            InputError: As in `settled`.
        """
        if self._began is not None:
            self._measured, self.part_rows = self._document["measured"], self._document["part_rows"]
            used = (f"{name} {value}" for name, value in self._document["tuned"].items() if value is not None)
            say(f"as begun: {', '.join(used)}")
            return with_tuning(runner, self._document["tuned"])

        def note(line: str) -> None:
            self._measured.append(line)
            say(line)

        runner, sample = settled(runner, options, self.sources, self.reading, note, say)
        self.part_rows = options.part_rows or MOST
        if options.part_rows is None and any(map(may_be_cut, self.sources)):
            sample = sample or sample_of(self.sources, self.reading, runner)
            if sample.items:
                self.part_rows = part_rows(rows_a_second(runner, sample))
        return runner

    def begin(self, runner: Runner, say: Say | None = None) -> None:
        """Write the run's settings, remove the half-written files of killed runs, and cut large files into parts.

        Args:
            runner: The model.
            say: Called with a line about each damaged shard, which will be scored again, and about files that cannot be cut.

        Raises:
            InputError: Another process began the folder after this one read it; or a source has the name of a shard that was
                scored from another place.
        """
        if self.folder.read(SETTINGS) != self._began:
            raise InputError(f"out: {self.folder.place!r} was begun by another process just now; --resume continues it")
        if self._began is not None:
            self.finished = self.folder.finished(say)
            _require_places(self.sources, self.finished)
        self.tuned = tuning_of(runner)
        if self._began is None:
            document = {
                "settings": self.settings, "tuned": self.tuned, "measured": self._measured, "part_rows": self.part_rows
            }  # fmt: skip
            self.folder.write(SETTINGS, json.dumps(document, indent=1) + "\n")
        self.folder.sweep()
        self._cut(say or (lambda line: None))

    def _cut(self, say: Say) -> None:
        """Replace large files among the sources by their parts. Remove what was scored of other versions of the sources."""
        if self.part_rows is None:
            return
        columns = [*column_names(self.reading.column), *column_names(self.reading.identity)]
        sources, whole, of_files = [], dict[str, list[str]](), dict[str, list[dict[str, Any]]]()
        for shard in self.finished.values():
            if "part" in shard:
                of_files.setdefault(shard["part"]["of"], []).append(shard)
        for source in self.sources:
            parts: list[Source] | str = [source]
            if not _same(source, self.finished.get(source.name)):
                parts = finished_parts(source, of_files.get(source.name, ())) or cut(source, columns, self.part_rows)
            if isinstance(parts, str):
                whole.setdefault(parts, []).append(source.place)
                parts = [source]
            sources += parts
        for reason, places in whole.items():
            say(f"not cut into parts ({reason}), so that an interruption loses a whole file: {_some(places)}")
        files, names = {source.file_name for source in sources}, {source.name for source in sources}
        if len(names) < len(sources):
            raise InputError(
                "data: expected files whose parts have names of their own, got a file named like another one's part"
            )
        for name, shard in list(self.finished.items()):
            if name not in names and shard.get("part", {}).get("of", name) in files:
                self.folder.remove(name)
                del self.finished[name]
        self.sources = sources

    def run(self, runner: Runner, finished: Iterator[Finished]) -> Iterator[Finished]:
        """Pass the finished shards on, and write the summary after the last one."""
        began, busy_before, here, failed = time.perf_counter(), runner.busy, Counts(), []
        for shard in finished:
            here += shard.counts
            if shard.error is None:
                self.finished[shard.source.name] = {**about(shard.source), **asdict(shard.counts)}
            else:
                failed.append(shard.error)
            yield shard
        seconds = time.perf_counter() - began
        counts = sum((Counts.from_json(about) for about in self.finished.values()), Counts())
        share = (runner.busy - busy_before) / (seconds * runner.workers) if seconds else 0.0
        settings = {**self.settings, **self.tuned, "part_rows": self.part_rows}
        self.summary = Summary(counts, here, len(self.finished), failed, seconds, share, settings, self._measured)
        self.folder.write(SUMMARY, json.dumps(self.summary.to_json(), indent=1) + "\n")

    def score(self, runner: Runner, progress: Progress | None = None, engine: Engine = score_shards) -> Iterator[Finished]:
        """Score the sources that are left."""
        return self.run(runner, engine(runner, self.left, self.folder, self._rest, about, progress))

    @property
    def _rest(self) -> Reading:
        """How the remaining shards are read: a limit applies to the whole corpus, finished shards included."""
        if self.reading.limit is None:
            return self.reading
        return replace(self.reading, limit=self.reading.limit - sum(counts["rows"] for counts in self.finished.values()))


def settled(
    runner: Runner, options: RunOptions, sources: Sequence[Source], reading: Reading, note: Say, say: Say
) -> tuple[Runner, Sample | None]:
    """Return the runner with its settings, given or measured, and the sample that was read to measure them, if one was.

    Args:
        runner: The model.
        options: How it is to be run.
        sources: The corpus.
        reading: How it is read.
        note: Called with a line about each measurement.
        say: Called with what else a user should know.

    Raises:
        InputError: As in `tuned`; results that are no scores are to be compiled; OpenVINO does not take the model, or is to run
            compiled code of torch.
    """
    options = _possible(runner, options)
    sizes: dict[str, Any] = {"max_tokens": options.max_tokens, "threads": options.threads}
    rough = untuned(runner, **sizes)
    if options.runtime == "openvino":
        rough = replace(rough, runtime="openvino")
    if None not in sizes.values() and not options.any_dtype and options.compile is False and options.runtime != "auto":
        return rough, None
    sample = sample_of(sources, reading, rough)
    if len(sample.items) >= FEWEST:
        say("measuring how the model runs fastest; each way is compared with the fastest so far")
        ways = {name: getattr(options, name) for name in ("any_dtype", "compile", "runtime")}
        return tuned(runner, sample, say=note, **ways, **sizes), sample
    if options.compile and sample.items:
        return tuned(runner, sample, max_tokens=rough.max_tokens, threads=rough.workers, compile=True, say=note), sample
    return rough, sample


def _possible(runner: Runner, options: RunOptions) -> RunOptions:
    """The options without what the model cannot be tried with. Raises InputError for what was asked for by name."""
    if options.runtime == "openvino":
        require_openvino(runner.task, runner.model)
        if options.compile:
            raise InputError("compile: expected off or auto with the runtime openvino, which compiles the model itself, got on")
    if options.runtime == "auto" and (options.compile or not takes_openvino(runner.task, runner.model)):
        options = replace(options, runtime="torch")
    if (kind := runner.task.output_kind(runner.model)) in WRITTEN:
        if options.compile:
            raise InputError(f"compile: expected off or auto where results are {kind}, which is not compiled, got on")
        # Another dtype and compilation are compared by probabilities of labels, which texts and spans do not have.
        options = replace(options, any_dtype=False, compile=False)
    return options


def sample_of(sources: Sequence[Source], reading: Reading, runner: Runner) -> Sample:
    """Return the first rows of a corpus, and how large it is, estimated from their share of its bytes."""
    rows, read = list[Row](), 0.0
    for source in sources:
        before = read
        with contextlib.suppress(ShardError):  # The run reports it.
            for chunk, share in source.read(reading.column, reading.identity):
                rows += chunk
                read = before + share * source.size
                if len(rows) >= 4 * FEWEST:
                    break
        if len(rows) >= 4 * FEWEST:
            break
    labels = len(runner.task.label_names(runner.model))
    cut = windows([(rows, 1.0)], runner.task, runner.model, labels, max_tokens=runner.max_tokens, on_long="cut")
    items = [item for window in cut for item in window.items]
    if not (rows and read and all(source.size for source in sources)):
        return Sample(items, rows)
    whole = len(rows) * sum(source.size for source in sources) / read
    count = min(whole, math.inf if reading.limit is None else reading.limit)
    return Sample(items, rows, count, count * sum(item.length for item in items) / len(rows))


@contextlib.contextmanager
def alone_in(folder: Folder) -> Iterator[None]:
    """Keep other processes of this machine out of a local folder.

    Raises:
        InputError: Another process uses the folder.
    """
    if not folder.local:
        yield
        return
    Path(folder.root).mkdir(exist_ok=True)
    with open_own(folder.path(".lock")) as file:
        require_alone(file, folder.place)
        yield


def about(source: Source) -> dict[str, Any]:
    """Return the metadata that a finished shard's file keeps of its source. Passwords in URLs are hidden."""
    return {"source": redacted(source.place), "size": source.file_size, "stamp": source.stamp, **about_part(source)}


def _same(source: Source, finished: Mapping[str, Any] | None) -> bool:
    """Tell whether a source is what was scored, by its size and its stamp. Older files keep no stamp."""
    return finished is not None and (finished["size"], finished.get("stamp", source.stamp)) == (
        source.file_size,
        source.stamp,
    )


def _some(places: Sequence[str]) -> str:
    """The first of some places, and how many more there are."""
    return redacted(places[0]) + (f" and {len(places) - 1} more" if len(places) > 1 else "")


def _settings_of(folder: Folder, text: str) -> dict[str, Any]:
    """Return the document that a begun folder keeps of its run. Raise InputError if it is damaged."""
    with reading("out", folder.path(SETTINGS), "is damaged; delete its folder to begin anew"):
        document = {"measured": [], "part_rows": None, **json.loads(text)}
        names = ("max_tokens", "workers", "threads", "compiled", "dtype")
        tuned = {name: document["tuned"][name] for name in names} | {"runtime": document["tuned"].get("runtime", "torch")}
        known = isinstance(getattr(torch, tuned["dtype"]), torch.dtype) and tuned["runtime"] in RUNTIMES[1:]
        if not known or not tuned["max_tokens"] >= 1 <= tuned["workers"]:
            raise ValueError(f"unknown settings {tuned}")
        if not (document["part_rows"] is None or document["part_rows"] >= 1):
            raise ValueError(f"unknown rows of a part: {document['part_rows']}")
        return {
            **document,
            "settings": {"format": FORMATS[0], **document["settings"]},
            "tuned": tuned,
            "measured": [*document["measured"]],
        }


def _require_places(sources: Sequence[Source], finished: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError for a source that has the name of a shard scored from another place.

    Else the source would be skipped, or its scores would replace the other shard's.
    """
    scored_from = {shard.get("part", {}).get("of", name): shard.get("source") for name, shard in finished.items()}
    for source in sources:
        place = redacted(scored_from.get(source.name) or source.place)
        if place != redacted(source.place):
            raise InputError(
                f"data: {source.name!r} was scored from {place!r}, got {source.place!r}; another corpus needs a new folder"
            )


def _require_column(source: Source, reading: Reading) -> None:
    """Raise InputError if the first shard lacks the column, or all of its first rows do.

    Other errors of the shard are left to the run, which reports them and goes on to the next shard.
    """
    try:
        rows, _ = next(source.read(reading.column, reading.identity))
    except ColumnError as error:
        raise InputError(f"data: {error}") from error
    except ShardError:
        return
    for column in column_names(reading.column):
        if rows and all(row.reason == no_column(column) for row in rows):
            raise InputError(f"data: {source.place}: expected the column {column!r}, which none of its first rows has")


def tuning_of(runner: Runner) -> dict[str, Any]:
    """Return how the model is run, as a JSON document."""
    options = {name: getattr(runner, name) for name in ("max_tokens", "workers", "threads", "compiled", "runtime")}
    return {**options, "dtype": str(next(runner.model.parameters()).dtype).removeprefix("torch.")}


def with_tuning(runner: Runner, tuned: Mapping[str, Any]) -> Runner:
    """Return the runner with settings from `tuning_of`, of an earlier run or of another process.

    Raises:
        InputError: The runtime is not installed here.
    """
    options = {name: value for name, value in tuned.items() if name != "dtype"}
    dtype = getattr(torch, tuned["dtype"])
    # Convert only a model of another dtype: a model that was loaded in this dtype may hold some parameters in a wider one.
    same = next(runner.model.parameters()).dtype == dtype
    runner = replace(runner, model=runner.model if same else runner.model.to(dtype), **options)
    if runner.runtime == "openvino":
        require_openvino(runner.task, runner.model)
    return runner
