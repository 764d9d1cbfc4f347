"""`secateur score`: a label and its probability for each document of a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.cli import inputs, output
from secateur.cli.options import Device, Dtype, Json, Kind, MaxLength, Model
from secateur.corpus.output import Counts, Folder
from secateur.corpus.pipeline import Model as Runner
from secateur.corpus.run import Job, Wanted, alone_in
from secateur.corpus.shards import Reading
from secateur.corpus.sources import Source, find_sources
from secateur.corpus.windows import require_on_long
from secateur.errors import InputError
from secateur.placement import weights_digest


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
    threads: Annotated[str, typer.Option(help="CPU threads, or auto: by measurement.")] = "auto",
    max_tokens: Annotated[str, typer.Option(help="Padded input tokens in a batch, or auto: by measurement.")] = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a corpus: shard by shard into Parquet, with what cannot be scored beside it. A killed run goes on by --resume."""
    wanted = Wanted(_number("max-tokens", max_tokens), _number("threads", threads), any_dtype=dtype == "auto")
    require_on_long(on_long)
    sources, folder = find_sources(data), Folder(out)
    loaded = inputs.load_model(model, task=task, device=device, dtype=dtype)
    job_task = inputs.make_task(loaded, labels, [{}], max_length)
    settings = {
        "model": weights_digest(loaded.model), "task": loaded.task, "labels": job_task.label_names(loaded.model),
        "max_length": job_task.max_length,
    }  # fmt: skip
    reading = Reading(column, id_column, on_long, limit)
    job = Job(sources, folder, reading, settings, resume=resume)
    runner = job.ready(Runner(loaded.model, job_task, max_tokens=1), wanted, output.say)
    left = job.left
    output.say(f"{len(sources)} shards, {len(sources) - len(left)} of them finished before")
    with alone_in(folder):
        job.begin(runner)
        try:
            with _bar(sum(source.size for source in left)) as advance:
                for each in job.score(runner, advance):
                    if each.error is not None:
                        output.say(f"secateur: {each.error}")
        except KeyboardInterrupt:
            output.say(f"{len(job.finished)} of {len(sources)} shards are finished; --resume goes on")
            raise
    summary = job.summary
    lines = [f"{len(summary.failed)} shards failed; --resume tries them again"] if summary.failed else []
    output.emit({**summary.to_json(), "out": out}, as_json, _table(summary.to_json()), *lines, f"scores in {out}")
    if summary.failed:
        raise typer.Exit(1)


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
