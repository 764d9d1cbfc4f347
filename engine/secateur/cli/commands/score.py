"""`secateur score`: a label and its probability for each document of a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.cli.shared import output
from secateur.cli.shared.options import Device, Dtype, Json, Kind, MaxLength, Model
from secateur.corpus import ray_engine
from secateur.corpus.output import Counts, Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.ray_engine import WorkerError
from secateur.corpus.run import Job, Wanted, alone_in, tuning_of, with_tuning
from secateur.corpus.shapes import keep_kernels
from secateur.corpus.shards import Engine, Reading, score_shards
from secateur.corpus.sources import Source, find_sources
from secateur.corpus.tuning import usable_cores
from secateur.corpus.windows import require_on_long
from secateur.flow.loaded import load_model, make_task
from secateur.model.offloading import weights_digest
from secateur.support.errors import InputError
from secateur.tasks.batches import model_device

COMPILE = {"auto": None, "on": True, "off": False}


def score(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Documents: files, patterns or URLs between commas, a folder of datasets' save_to_disk, or a Hub name."
        ),
    ],
    out: Annotated[str, typer.Option(help="Output folder, local or a URL.")],
    column: Annotated[str, typer.Option(help="Of the text.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="A column to carry over.")] = None,
    labels: Annotated[str, typer.Option(help="Candidate labels between commas; auto: the model's own.")] = "auto",
    task: Kind = None,
    max_length: MaxLength = None,
    on_long: Annotated[str, typer.Option(help="Documents longer than the model takes: cut, or error (rejected).")] = "cut",
    limit: Annotated[int | None, typer.Option(help="Score the first that many documents.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a folder that was begun.")] = False,
    threads: Annotated[str, typer.Option(help="CPU threads, with Ray of each worker; auto: by measurement.")] = "auto",
    max_tokens: Annotated[str, typer.Option(help="Padded input tokens in a batch, or auto: by measurement.")] = "auto",
    dtype: Dtype = "auto",
    compile: Annotated[str, typer.Option(help="By torch.compile: on, off, or auto: if a long corpus gains by it.")] = "auto",
    device: Device = "auto",
    engine: Annotated[str, typer.Option(help="local: this process; ray: workers of Ray Data.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Of Ray; else as many as the cluster has room for.", min=1)] = None,
    ray_address: Annotated[str | None, typer.Option(help="Of a Ray cluster, or auto; else as ray.init does.")] = None,
    as_json: Json = False,
) -> None:
    """Score a corpus: shard by shard into Parquet, with what cannot be scored beside it. A killed run goes on by --resume."""
    if compile not in COMPILE:
        raise InputError(f"compile: expected {', '.join(COMPILE)}, got {compile!r}")
    wanted = Wanted(_number("max-tokens", max_tokens), _number("threads", threads), dtype == "auto", COMPILE[compile])
    require_on_long(on_long)
    _require_engine(engine, workers, ray_address, limit)
    if engine == "ray" and wanted.compile is None:
        wanted = replace(wanted, compile=False)  # How long its workers will take is not known here.
    keep_kernels()
    recipe = _Recipe(model, task, labels, max_length, device, dtype)
    reading = Reading(column, id_column, on_long, limit)
    with ray_engine.cluster(ray_address) if engine == "ray" else nullcontext():
        if workers is not None and wanted.threads is None:
            wanted = replace(wanted, threads=min(ray_engine.threads_for(workers), usable_cores()))
        runner, kind = recipe.make()
        sources, folder = find_sources(data), Folder(out)
        weights = weights_digest(runner.model)
        settings = {
            "model": weights, "task": kind, "labels": runner.task.label_names(runner.model),
            "max_length": runner.task.max_length,
        }  # fmt: skip
        job = Job(sources, folder, reading, settings, resume=resume)
        runner = job.ready(runner, wanted, output.say)
        scorer = _on_ray(runner, recipe, weights, workers) if engine == "ray" else score_shards
        with alone_in(folder):
            job.begin(runner)
            if job.unnamed:
                output.say(f"{len(job.unnamed)} finished shards are none of --data's; their scores stay, and are counted")
            _score(job, runner, scorer)
    summary = job.summary
    lines = [f"{len(summary.failed)} shards failed; --resume tries them again"] if summary.failed else []
    output.emit({**summary.to_json(), "out": out}, as_json, _table(summary.to_json()), *lines, f"scores in {out}")
    if summary.failed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Recipe:
    """What a model and its task are made of, here and in Ray's workers."""

    model: str
    task: str | None
    labels: str
    max_length: int | None
    device: str
    dtype: str

    def make(self) -> tuple[Runner, str]:
        """The model, not tuned yet, and the name of its task."""
        loaded = load_model(self.model, task=self.task, device=self.device, dtype=self.dtype)
        task = make_task(loaded, self.labels, [{}], self.max_length)
        return Runner(loaded.model, task.require_texts(), max_tokens=1), loaded.task

    def make_again(self, weights: str, tuned: dict[str, Any]) -> Runner:
        """The model as it is run in a worker. weights: their digest. Raises InputError: others than those."""
        runner, _ = self.make()
        if weights_digest(runner.model) != weights:
            raise InputError(
                f"model: expected {self.model!r} to be one model on all machines, got other weights on {gethostname()}"
            )
        return with_tuning(runner, tuned)

    def elsewhere(self, device: str) -> _Recipe:
        """The same for processes with another working folder. device: its kind; of several GPUs Ray shows a worker its own."""
        folder = Path(self.model)
        return replace(self, model=str(folder.absolute()) if folder.is_dir() else self.model, device=device)


def _on_ray(runner: Runner, recipe: _Recipe, weights: str, workers: int | None) -> Engine:
    room = ray_engine.room_for(runner)
    if workers is not None and workers > room:
        output.say(f"{workers} workers wanted, of which the cluster has room for {room} now")
    load = partial(recipe.elsewhere(model_device(runner.model).type).make_again, weights, tuning_of(runner))
    return partial(ray_engine.score_on_ray, load, workers or room)


def _score(job: Job, runner: Runner, engine: Engine) -> None:
    """Scores what is left, with a bar, and says which shards failed."""
    left = job.left
    output.say(f"{len(job.sources)} shards, {len(job.sources) - len(left)} of them finished before")
    try:
        with _bar(sum(source.size for source in left)) as advance:
            for each in job.score(runner, advance, engine):
                if each.error is not None:
                    output.say(f"secateur: {each.error}")
    except WorkerError as error:
        output.say(f"secateur: {error}; {_so_far(job)}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        output.say(_so_far(job))
        raise


def _so_far(job: Job) -> str:
    return f"{len(job.finished)} of {len(job.sources)} shards are finished; --resume goes on"


def _require_engine(engine: str, workers: int | None, address: str | None, limit: int | None) -> None:
    if engine not in ("local", "ray"):
        raise InputError(f"engine: expected local or ray, got {engine!r}")
    for name, value in (("workers", workers), ("ray-address", address)):
        if value is not None and engine == "local":
            raise InputError(f"{name}: expected none without --engine ray, got {value!r}")
    if limit is not None and engine == "ray":
        raise InputError(f"limit: expected none with --engine ray, whose workers do not know of each other's rows, got {limit}")


def _number(name: str, text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{name}: expected auto or a number of at least 1, got {text!r}")
    return int(text)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[Source, float, Counts], None]]:
    """A bar over the shards' bytes, with documents and tokens a second."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=output.stderr, transient=True, disable=not output.stderr.is_terminal) as bar:
        task = bar.add_task("scoring", total=total or None, rates="")
        counts, shares = Counts(), dict[str, float]()

        def advance(source: Source, share: float, window: Counts) -> None:
            nonlocal counts
            counts += window
            step = source.size * (share - shares.get(source.name, 0.0))
            shares[source.name] = share
            elapsed = bar.tasks[0].elapsed or 1e-9
            rates = f"{counts.rows:,} documents, {counts.rows / elapsed:,.0f}/s, {counts.tokens / elapsed:,.0f} tokens/s"
            bar.update(task, advance=step, rates=rates)

        yield advance


def _table(found: dict[str, Any]) -> Any:
    rows = [
        ("documents", f"{found['rows']:,}"), ("scored", f"{found['scored']:,}"), ("rejected", f"{found['rejected']:,}"),
        ("shards", f"{found['shards']:,}"), ("documents/s", f"{found['documents_per_second']:,.1f}"),
        ("tokens/s", f"{found['tokens_per_second']:,.0f}"), ("padding", f"{found['padding']:.1%}"),
        ("model busy", f"{found['busy']:.1%}"), ("seconds", f"{found['seconds']:,.1f}"),
    ]  # fmt: skip
    return output.table(("", ""), rows)
