"""`secateur score`: write a label and its probability for each document of a corpus."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Annotated, Any

import typer

from secateur.cli.shared import output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.inputs import prompt_named
from secateur.cli.shared.options import (
    DATA,
    MACHINE,
    OUTPUT,
    Chat,
    Device,
    Dtype,
    Json,
    Kind,
    MaxLength,
    Model,
    PromptText,
    System,
)
from secateur.cli.shared.tell import tell
from secateur.corpus import ray_engine
from secateur.corpus.estimate import estimate as estimated
from secateur.corpus.output import FORMATS, Counts, Folder
from secateur.corpus.pipeline import Runner
from secateur.corpus.ray_engine import WorkerError
from secateur.corpus.run import CorpusRun, RunOptions, alone_in, tuning_of, with_tuning
from secateur.corpus.shapes import keep_kernels
from secateur.corpus.shards import Engine, Reading, score_shards
from secateur.corpus.sources import Source, find_sources
from secateur.corpus.tuning import RUNTIMES, usable_cores
from secateur.corpus.windows import require_input_columns, require_on_long
from secateur.data.columns import require_columns_given, resolve
from secateur.flow.loaded import load_model, make_task
from secateur.model.discovery import config_digest
from secateur.model.offloading import weights_digest
from secateur.support.errors import InputError
from secateur.support.fields import shown, whole_number
from secateur.tasks import Prompt, Task
from secateur.tasks.batches import model_device
from secateur.tasks.fitting import reader_digest
from secateur.tasks.prompt import columns_with
from secateur.tasks.text import MOST_BEAMS

COMPILE = {"auto": None, "on": True, "off": False}
NEW_TOKENS = 64  # The most tokens of a generated text, by default.
LABELS_SHOWN = 20  # The labels whose rows the table counts. The JSON summary counts all.


def score(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Documents or images: files, patterns or URLs between commas, a folder of save_to_disk, or a Hub name.",
            rich_help_panel=DATA,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="Output folder: a local path or a URL; not needed with --estimate.", rich_help_panel=OUTPUT, show_default=False
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            "--input-column",
            "--column",
            help="Column of the inputs, or two columns between commas for pairs of texts; by default, 'text' or common names.",
            rich_help_panel=DATA,
        ),
    ] = None,
    prompt: PromptText = None,
    chat: Chat = False,
    system: System = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column to carry over: --keep-columns of one column.", rich_help_panel=OUTPUT)
    ] = None,
    keep_columns: Annotated[
        str | None,
        typer.Option(help="Columns to carry over into the output, between commas: id,title,date.", rich_help_panel=OUTPUT),
    ] = None,
    format: Annotated[str, typer.Option(help="Format of the scores: parquet, jsonl or csv.", rich_help_panel=OUTPUT)] = FORMATS[
        0
    ],
    labels: Annotated[
        str,
        typer.Option(
            help="Candidate labels: between commas, a JSON list, or a file (.txt: a label a line; .json: a list); auto: the "
            "model's own; open: generate text. For a causal-lm, spaces around a label are part of it.",
            rich_help_panel=DATA,
        ),
    ] = "auto",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"With --labels open: the most tokens of a generated text, at most as many as the model has positions for; by "
            f"default, {NEW_TOKENS}.",
            min=1,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    beams: Annotated[
        int,
        typer.Option(
            help="With --labels open: the number of beams to generate with; 1 is greedy.",
            min=1,
            max=MOST_BEAMS,
            rich_help_panel=OUTPUT,
        ),
    ] = 1,
    kind: Kind = None,
    max_length: MaxLength = None,
    on_long: Annotated[
        str,
        typer.Option(
            help="What to do with documents that are too long for the model: cut, or error (reject them).", rich_help_panel=DATA
        ),
    ] = "cut",
    limit: Annotated[
        int | None, typer.Option(help="Score only the first N documents; by default, all of them.", min=1, rich_help_panel=DATA)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume a run in a folder that was begun.", rich_help_panel=OUTPUT)
    ] = False,
    threads: Annotated[
        str, typer.Option(help="CPU threads, with Ray for each worker; auto: measured at the start.", rich_help_panel=MACHINE)
    ] = "auto",
    max_tokens: Annotated[
        str,
        typer.Option(
            help="Largest number of input tokens in a batch, padding included; auto: measured at the start.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    part_rows: Annotated[
        str,
        typer.Option(
            help="Most rows of a part of a large file, which is what an interruption loses; auto: about 30 s of work.",
            rich_help_panel=OUTPUT,
        ),
    ] = "auto",
    dtype: Dtype = "auto",
    compile: Annotated[
        str,
        typer.Option(help="Use torch.compile: on, off, or auto (if it makes a long corpus faster).", rich_help_panel=MACHINE),
    ] = "auto",
    device: Device = "auto",
    engine_runtime: Annotated[
        str,
        typer.Option(
            help="What computes the scores: torch, openvino (on a CPU: classifiers, labels by T5 or BART), or auto (faster).",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    engine: Annotated[
        str, typer.Option(help="Where to score: local (this process) or ray (workers of Ray Data).", rich_help_panel=MACHINE)
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Number of Ray workers; by default, as many as the cluster has room for.", min=1, rich_help_panel=MACHINE
        ),
    ] = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Score a sample alone, and say documents per second and hours for all. Writes nothing.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    beside: Annotated[
        str | None,
        typer.Option(help="With --estimate: another model, such as the dense one, for comparison.", rich_help_panel=MACHINE),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(help="With --estimate: the price of an hour of this machine, for the cost.", rich_help_panel=MACHINE),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster, or auto; by default, ray.init decides.", rich_help_panel=MACHINE),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a corpus, shard by shard, into Parquet files, and list rejected documents. --resume continues a killed run."""
    if compile not in COMPILE:
        raise InputError(f"compile: expected {', '.join(COMPILE)}, got {compile!r}")
    if engine_runtime not in RUNTIMES:
        raise InputError(f"engine-runtime: expected {', '.join(RUNTIMES)}, got {engine_runtime!r}")
    options = RunOptions(
        _number("max-tokens", max_tokens), _number("threads", threads), dtype == "auto", COMPILE[compile],
        engine_runtime, _number("part-rows", part_rows),
    )  # fmt: skip
    require_on_long(on_long)
    _require_engine(engine, workers, ray_address, limit)
    if engine == "ray" and options.compile is None:
        options = replace(options, compile=False)  # The time that Ray's workers will take is unknown here.
    if engine == "ray" and engine_runtime == "auto":
        options = replace(options, runtime="torch")  # What other machines have installed is unknown here.
    _require_estimate(estimate, beside, price_per_hour, engine, resume)
    keep_kernels()
    recipe = _Recipe(model, kind, labels, max_length, device, dtype, max_new_tokens, beams, prompt_named(prompt, chat, system))
    kept = _kept(id_column, keep_columns)
    if estimate:
        _estimate(recipe, beside, price_per_hour, data, (column, kept, on_long, limit), options, as_json)
        return
    if out is None:
        raise InputError("out: expected a folder, or --estimate, which writes nothing, got none")
    folder = Folder(out, format)
    folder.require_writable()
    with ray_engine.cluster(ray_address) if engine == "ray" else nullcontext():
        if workers is not None and options.threads is None:
            options = replace(options, threads=min(ray_engine.threads_for(workers), usable_cores()))
        runner, task_kind = recipe.make()
        runner.task.require_fit(runner.model)  # Before the folder is begun.
        sources, weights = find_sources(data), weights_digest(runner.model)
        settings: dict[str, Any] = {
            "model": weights, "config": config_digest(runner.model), "tokenizer": reader_digest(runner.task.reader),
            "task": task_kind, "labels": runner.task.label_names(runner.model),
            "max_length": runner.task.max_length,
            # None where there is none: a resumed run without it must not pass for the run that had it.
            "prompt": None if runner.task.prompt is None else asdict(runner.task.prompt),
            "max_new_tokens": runner.task.new_tokens, "beams": runner.task.beams if runner.task.beams > 1 else None,
        }  # fmt: skip
        if (outputs := runner.task.output_kind(runner.model)) != "label":
            settings["outputs"] = outputs
        reading = Reading(_input_column(sources, runner.task, column), kept, on_long, limit)
        corpus_run = CorpusRun(sources, folder, reading, settings, resume=resume)
        runner = corpus_run.ready(runner, options, output.say)
        scorer = _on_ray(runner, recipe, weights, workers) if engine == "ray" else score_shards
        with alone_in(folder):
            corpus_run.begin(runner, output.say)
            if corpus_run.unnamed:
                output.say(
                    f"{len(corpus_run.unnamed)} finished shards are none of --data's; their scores stay, and are counted"
                )
            _score(corpus_run, runner, scorer)
    summary = corpus_run.summary
    lines = [f"{len(summary.failed)} shards failed; --resume tries them again"] if summary.failed else []
    if summary.counts.rejected:
        lines.append(f"the rejected documents and the reasons are in {out.rstrip('/')}/rejects")
    output.emit({**summary.to_json(), "out": out}, as_json, _table(summary.to_json()), *lines, f"scores in {out}")
    if summary.failed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Recipe:
    """How to load a model and its task, in this process and in Ray's workers."""

    model: str
    kind: str | None
    labels: str | Sequence[str]
    max_length: int | None
    device: str
    dtype: str
    max_new_tokens: int | None = None
    beams: int = 1
    prompt: Prompt | None = None

    def make(self) -> tuple[Runner, str]:
        """Return the model, not tuned yet, and the kind of its task."""
        loaded = load_model(self.model, task=self.kind, device=self.device, dtype=self.dtype)
        task = make_task(loaded, self.labels, [{}], self.max_length, prompt=self.prompt)
        if task.labels is None and not task.labels_from_model:
            task = task.generating(loaded.model, self.max_new_tokens or NEW_TOKENS, self.beams)
        elif self.max_new_tokens is not None:
            raise InputError(f"max-new-tokens: expected none without --labels open, got {self.max_new_tokens}")
        elif self.beams != 1:
            raise InputError(f"beams: expected 1 without --labels open, got {self.beams}")
        return Runner(loaded.model, task, max_tokens=1), loaded.task

    def make_again(self, weights: str, tuned: dict[str, Any]) -> Runner:
        """Return the model for a worker.

        Args:
            weights: The digest of the weights that it must have.
            tuned: How the model is run, from `tuning_of`.

        Raises:
            InputError: The weights differ.
        """
        runner, _ = self.make()
        if weights_digest(runner.model) != weights:
            raise InputError(
                f"model: expected {self.model!r} to be one model on all machines, got other weights on {gethostname()}"
            )
        return with_tuning(runner, tuned)

    def elsewhere(self, device: str) -> _Recipe:
        """Return the recipe for processes with another working folder.

        Ray shows a worker only its own GPU, so `device` has no number.
        """
        folder = Path(self.model)
        return replace(self, model=str(folder.absolute()) if folder.is_dir() else self.model, device=device)


def _require_estimate(estimate: bool, beside: str | None, price: float | None, engine: str, resume: bool) -> None:
    """Raise InputError for options that belong to --estimate without it, or that it does not take."""
    for name, value in (("beside", beside), ("price-per-hour", price)):
        if value is not None and not estimate:
            raise InputError(f"{name}: expected none without --estimate, got {value!r}")
    if price is not None and not (price >= 0 and math.isfinite(price)):
        raise InputError(f"price-per-hour: expected a number of at least 0, got {price}")
    if estimate and engine == "ray":
        raise InputError("engine: expected local with --estimate, which measures this process, got ray")
    if estimate and resume:
        raise InputError("resume: expected none with --estimate, which counts all documents, got --resume")


def _estimate(
    recipe: _Recipe,
    beside: str | None,
    price: float | None,
    data: str,
    reading: tuple[str | None, Any, str, int | None],
    options: RunOptions,
    as_json: bool,
) -> None:
    """Print how long the corpus takes, with the model and with the one beside it."""
    names = [recipe.model, *([] if beside is None else [beside])]
    runners = [replace(recipe, model=name).make()[0] for name in names]
    for runner in runners:
        runner.task.require_fit(runner.model)
    sources, (column, *rest) = find_sources(data), reading
    how = Reading(_input_column(sources, runners[0].task, column), *rest)
    estimates, sampled = estimated(runners, sources, how, options, output.say)
    documents = estimates[0].documents
    models = [
        {
            "model": name, "documents_per_second": round(of.documents_per_second, 2), "hours": of.hours,
            "cost": None if price is None or of.hours is None else price * of.hours,
            "settings": of.settings, "measured": of.measured,
        }
        for name, of in zip(names, estimates, strict=True)
    ]  # fmt: skip
    speedup = None if beside is None else estimates[0].slower[1]
    document = {
        "documents": None if documents is None else round(documents), "sampled": sampled, "price_per_hour": price,
        "models": models, "speedup": speedup,
    }  # fmt: skip
    lines = [f"{names[0]} is {speedup:.2f}x as fast as {names[1]}"] if speedup is not None else []
    whole = "an unknown number of" if documents is None else f"about {documents:,.0f}"
    output.emit(document, as_json, _estimates(models), *lines, f"from {sampled:,} of {whole} documents; nothing was written")


def _estimates(models: Sequence[dict[str, Any]]) -> Any:
    """A table of estimates."""
    rows = [
        (
            of["model"], f"{of['documents_per_second']:,.1f}", _figure(of["hours"]), _figure(of["cost"]),
            of["settings"]["runtime"], of["settings"]["dtype"],
        )
        for of in models
    ]  # fmt: skip
    return output.table(("model", "documents/s", "hours", "cost", "runtime", "dtype"), rows)


def _figure(value: float | None) -> str:
    """A number with three digits, or nothing."""
    return "" if value is None else f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _on_ray(runner: Runner, recipe: _Recipe, weights: str, workers: int | None) -> Engine:
    """The engine that scores on Ray."""
    room = ray_engine.room_for(runner)
    if workers is not None and workers > room:
        output.say(f"{workers} workers requested, of which the cluster has room for {room} now")
    # The workers may not reach a file of labels.
    recipe = replace(recipe, labels=recipe.labels if runner.task.labels is None else runner.task.labels)
    load = partial(recipe.elsewhere(model_device(runner.model).type).make_again, weights, tuning_of(runner))
    return partial(ray_engine.score_on_ray, load, workers or room)


def _score(corpus_run: CorpusRun, runner: Runner, engine: Engine) -> None:
    """Score the shards that are left, with a progress bar, and report the failed ones."""
    left = corpus_run.left
    output.say(f"{len(corpus_run.sources)} shards, {len(corpus_run.sources) - len(left)} of them finished before")
    try:
        with _advancing(left) as advance:
            for shard in corpus_run.score(runner, advance, engine):
                if shard.error is not None:
                    tell(shard.error)
    except WorkerError as error:
        tell(f"{error}; {_so_far(corpus_run)}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        output.say(_so_far(corpus_run))
        raise


def _so_far(corpus_run: CorpusRun) -> str:
    """A line about the finished shards."""
    return f"{len(corpus_run.finished)} of {len(corpus_run.sources)} shards are finished; --resume continues the run"


def _require_engine(engine: str, workers: int | None, address: str | None, limit: int | None) -> None:
    """Raise InputError for options that the engine does not take."""
    if engine not in ("local", "ray"):
        raise InputError(f"engine: expected local or ray, got {engine!r}")
    for name, value in (("workers", workers), ("ray-address", address)):
        if value is not None and engine == "local":
            raise InputError(f"{name}: expected none without --engine ray, got {value!r}")
    if limit is not None and engine == "ray":
        raise InputError(f"limit: expected none with --engine ray, whose workers do not know of each other's rows, got {limit}")


def _kept(id_column: str | None, keep_columns: str | None) -> str | list[str] | None:
    """The columns to carry over: none, one, or several."""
    if id_column is not None and keep_columns is not None:
        raise InputError(
            f"keep-columns: expected either it or --id-column, which is the same, got {keep_columns!r} and {id_column!r}"
        )
    names = [] if keep_columns is None else [name.strip() for name in keep_columns.split(",")]
    if not all(names):
        raise InputError(f"keep-columns: expected names between commas, got {keep_columns!r}")
    return names if len(names) > 1 else (names[0] if names else id_column)


def _input_column(sources: Sequence[Source], task: Task, given: str | None) -> str | list[str]:
    """The column of the inputs, or the columns of their texts.

    They are the given ones, those that the prompt names, "text", or those with common names in the first shard.
    """
    role = task.columns[0]
    named = require_columns_given(columns_with(task.prompt, None if given is None else {role: given}), (role,))
    present = [] if named else sources[0].columns()
    if present and ("text" not in present or role == "image"):
        named = resolve((role,), present, pairs=task.takes_pairs and task.prompt is None)
    names = named.get(role, ("text",))
    require_input_columns(task, names)
    return names[0] if len(names) == 1 else [*names]


def _number(name: str, text: str) -> int | None:
    """Parse auto (None) or a positive number."""
    if text == "auto":
        return None
    number = whole_number(text)
    if not number:
        raise InputError(f"{name}: expected auto or a number of at least 1, got {shown(text)}")
    return number


@contextmanager
def _advancing(sources: Sequence[Source]) -> Iterator[Callable[[Source, float, Counts], None]]:
    """Provide the function that shows how much of the shards' bytes is done, with documents and tokens a second."""
    total, counts, done, of_shards = sum(source.size for source in sources), Counts(), 0, dict[str, int]()

    def amount(done: int, total: int, seconds: float) -> str:
        share = f"{done / total:.0%}, " if total else ""
        rates = f", {counts.rows / seconds:,.0f}/s, {counts.tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""
        return f"{share}{counts.rows:,} documents{rates}"

    with bars(amount).open("scoring") as report:
        report(0, total)

        def advance(source: Source, share: float, window: Counts) -> None:
            nonlocal counts, done
            counts += window
            # Only this shard's share has changed: a sum over 100,000 shards would cost more than the window.
            done += round(source.size * share) - of_shards.get(source.name, 0)
            of_shards[source.name] = round(source.size * share)
            report(done, total)

        yield advance


def _table(summary: dict[str, Any]) -> Any:
    """A table of the summary."""
    rows = [
        ("documents", f"{summary['rows']:,}"), ("scored", f"{summary['scored']:,}"), ("rejected", f"{summary['rejected']:,}"),
        ("shards", f"{summary['shards']:,}"), ("documents/s", f"{summary['documents_per_second']:,.1f}"),
        ("tokens/s", f"{summary['tokens_per_second']:,.0f}"), ("padding", f"{summary['padding']:.1%}"),
        ("model busy", f"{summary['busy']:.1%}"), ("seconds", f"{summary['seconds']:,.1f}"),
    ]  # fmt: skip
    labels = sorted(summary["labels"].items(), key=lambda item: -item[1])
    rows += [(f"label {name}", f"{count:,}") for name, count in labels[:LABELS_SHOWN]]
    if len(labels) > LABELS_SHOWN:
        rows.append((f"{len(labels) - LABELS_SHOWN} further labels", f"{sum(count for _, count in labels[LABELS_SHOWN:]):,}"))
    return output.table(("", ""), rows)
