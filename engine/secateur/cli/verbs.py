"""The verbs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer

import secateur
from secateur.allocation import Allocation
from secateur.benchmarking import benchmark, synthetic_batches
from secateur.cli import inputs, ldnet, output, reproduce
from secateur.cli.layer_gates import layer_gates
from secateur.cli.layers import layers
from secateur.cli.multitask import multitask
from secateur.cli.options import (
    Align,
    AllocationName,
    Checkpoints,
    Column,
    CriterionName,
    Data,
    Device,
    DeviceMap,
    Dtype,
    Floor,
    Flops,
    Json,
    Keep,
    Kind,
    Labels,
    Lengths,
    Limit,
    MaxLength,
    MaxTokens,
    Memory,
    Model,
    Out,
    Over,
    Params,
    PerHead,
    Recover,
    Select,
    Sizes,
    TargetName,
    Threads,
    TokenColumn,
    UnitOption,
    Unlabeled,
)
from secateur.cli.prune import prune
from secateur.cli.score import score
from secateur.cli.torchrun import processes
from secateur.criteria import PRESETS, summary
from secateur.files import new_folder, require_absent
from secateur.plots import benchmark_plot, sweep_plot
from secateur.scores import Scores
from secateur.sweeping import sweep, to_csv
from secateur_kernels.backend import Backend

app = typer.Typer(
    help="Cut a multi-task language model down to the one task that you run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(reproduce.app, name="reproduce")
app.add_typer(ldnet.app, name="ldnet")
app.command()(layers)
app.command()(layer_gates)
app.command()(multitask)
app.command()(prune)
app.command()(score)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(secateur.__version__)
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Output folder; must not exist yet.")] = Path("demo-out"),
    task: Annotated[str, typer.Option(help="Which of the built-in tasks.")] = "language",
    unit: UnitOption = "channel",
    keep: Annotated[float, typer.Option(help="The rate at which the pruned model is written.")] = 0.5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The whole flow on the built-in model and data."""
    from secateur.cli.demo import run

    inputs.use_threads(threads)
    document, shown = run(out, task, keep, inputs.unit(unit))
    output.emit(document, as_json, *shown)


@app.command()
def sites(model: Model, unit: UnitOption = "head", select: Select = None, as_json: Json = False) -> None:
    """What could be pruned: name, units, and what one unit costs."""
    found = secateur.sites(inputs.meta_model(model, task=None), unit=inputs.unit(unit), select=select)
    output.emit({"sites": [site.to_json() for site in found]}, as_json, output.sites_table(found))


@app.command()
def criteria(as_json: Json = False) -> None:
    """How units can be scored: what --criterion takes, with its settings and their defaults."""
    found = [{"name": name, "summary": summary(name), "settings": asdict(make())} for name, make in PRESETS.items()]
    low_rank = "svd scores no units: secateur.factorise gives layers of low rank, which `secateur reproduce ap` compares with"
    output.emit({"criteria": found}, as_json, output.criteria_table(found), low_rank)


@app.command()
def attribute(
    model: Model,
    data: Data,
    out: Out,
    task: Kind = None,
    labels: Labels = "auto",
    column: Column = None,
    token_column: TokenColumn = "1",
    unit: UnitOption = "head",
    select: Select = None,
    criterion: CriterionName = "gradient",
    target: TargetName = None,
    over_examples: Over = None,
    unlabeled: Unlabeled = False,
    examples: Limit = None,
    max_tokens: MaxTokens = 4096,
    max_length: MaxLength = None,
    per_example: Annotated[bool, typer.Option(help="Keep each example's scores too.")] = False,
    backend: Annotated[str, typer.Option(help="Of the kernels: auto (Triton on a CUDA device), reference or triton.")] = "auto",
    checkpoint: Checkpoints = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score each unit by what it does for a task: writes scores (safetensors). torchrun deals it out among processes."""
    inputs.use_threads(threads)
    with processes(device, device_map) as ranks:
        require_absent(out, "file")
        chosen = inputs.make_criterion(criterion, target, over_examples, unlabeled)
        loaded, job, rows = inputs.prepare(
            model, data, task=task, labels=labels, examples=examples, max_length=max_length, device=device, dtype=dtype,
            device_map=device_map, unlabeled=unlabeled, columns=(column, token_column),
        )  # fmt: skip
        scores = secateur.attribute(
            loaded.model, job, rows, criterion=chosen, unit=inputs.unit(unit), select=select, max_tokens=max_tokens,
            per_example=per_example, backend=cast(Backend, backend), checkpoint=checkpoint, group=ranks.group,
            progress=None if ranks.rank else output.batch_progress,
        )  # fmt: skip
        if ranks.rank == 0:
            scores.save(out)
    if ranks.rank:
        return
    document = {"out": str(out), "examples": scores.examples, "criterion": scores.criterion, "sites": len(scores.sites)}
    if scores.convergence is not None:
        document["convergence"] = scores.convergence.summary()
    line = f"{scores.examples} examples; scores written to {out}"
    output.emit(document, as_json, output.scores_table(scores), *output.convergence(scores), line)


@app.command()
def plan(
    scores: Annotated[Path, typer.Argument(help="Scores written by attribute.")],
    out: Out,
    keep: Keep = None,
    flops: Flops = None,
    params: Params = None,
    memory: Memory = None,
    allocation: AllocationName = "uniform",
    floor: Floor = None,
    align: Align = "1",
    per_head: PerHead = False,
    as_json: Json = False,
) -> None:
    """Choose which units stay, under a budget: writes a plan (JSON)."""
    require_absent(out, "file")
    made = secateur.plan(
        Scores.load(scores),
        keep=keep,
        flops=flops,
        params=params,
        memory=memory,
        allocation=cast(Allocation, allocation),
        floor=floor or 0.0,
        align=inputs.alignment(align, inputs.device_named("auto").type),
        per_head=per_head,
    )
    made.save(out)
    document = {"out": str(out), "budget": made.budget, "stay": {name: len(made[name]) for name in made}}
    left = made.budget["remaining"]
    line = (
        f"of the layers remain {left['params']:.1%} of the parameters, {left['flops']:.1%} of the FLOPs; plan written to {out}"
    )
    output.emit(document, as_json, output.plan_table(made), line)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    task: Kind = None,
    labels: Labels = "auto",
    column: Column = None,
    token_column: TokenColumn = "1",
    examples: Limit = None,
    max_tokens: MaxTokens = 8192,
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """A model's accuracy, exact match, entity F1 or perplexity on examples, with its 95% interval."""
    inputs.use_threads(threads)
    loaded, job, rows = inputs.prepare(
        model, data, task=task, labels=labels, examples=examples, max_length=max_length, device=device, dtype=dtype,
        columns=(column, token_column),
    )  # fmt: skip
    result = secateur.evaluate(loaded.model, job, rows, max_tokens=max_tokens)
    output.emit({"model": model, **result.to_json()}, as_json, str(result))


@app.command()
def bench(
    dense: Annotated[str, typer.Argument(help="The dense model.")],
    pruned: Annotated[str, typer.Argument(help="The pruned model.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report and the plot; must not exist yet.")] = None,
    batch_sizes: Sizes = "1,8,32",
    lengths: Lengths = "16,64",
    target_length: Annotated[int, typer.Option(help="Decoder tokens, where there is an encoder.", min=1)] = 8,
    pairs: Annotated[int, typer.Option(help="Interleaved runs of each model.", min=3)] = 20,
    task: Kind = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Dense against pruned: latency and throughput over batch sizes and lengths, as ratios with their spread."""
    inputs.use_threads(threads)
    if out is not None:
        require_absent(out)
    sizes, tokens = inputs.numbers(batch_sizes, "batch-sizes"), inputs.numbers(lengths, "lengths")
    first = inputs.load_model(dense, task=task, device=device, dtype=dtype)
    second = inputs.load_model(pruned, task=task or first.task, device=device, dtype=dtype)
    batches = synthetic_batches(first.model, sizes, tokens, target_length=target_length)
    report = benchmark(first.model, second.model, batches, pairs=pairs)
    if out is not None:
        with new_folder(out) as folder:
            (folder / "benchmark.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
            (folder / "benchmark.png").write_bytes(benchmark_plot(report, "dense against pruned"))
    output.emit(report.to_json(), as_json, output.timings_table(report), *report.notes)


@app.command(name="sweep")
def sweep_(
    model: Model,
    data: Data,
    out: Out,
    evaluation: Annotated[str, typer.Option("--eval", help="Held-out examples to evaluate on.")],
    keeps: Annotated[str, typer.Option(help="Rates between commas.")] = "0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2",
    task: Kind = None,
    labels: Labels = "auto",
    column: Column = None,
    token_column: TokenColumn = "1",
    unit: UnitOption = "head",
    select: Select = None,
    criterion: CriterionName = "gradient",
    target: TargetName = None,
    over_examples: Over = None,
    unlabeled: Unlabeled = False,
    examples: Limit = None,
    max_tokens: MaxTokens = 4096,
    max_length: MaxLength = None,
    align: Align = "1",
    per_head: PerHead = False,
    recover: Recover = "least-squares",
    batch_size: Annotated[int, typer.Option(help="Of the timed batch.", min=1)] = 32,
    length: Annotated[int, typer.Option(help="Tokens of the timed batch.", min=1)] = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Accuracy against size and speed over several rates, as CSV, JSON and PNG."""
    inputs.use_threads(threads)
    require_absent(out)
    (refit,) = inputs.recoveries(recover, tries=False)
    rates = inputs.numbers(keeps, "keeps", float)
    chosen = inputs.make_criterion(criterion, target, over_examples, unlabeled)
    loaded, job, rows = inputs.prepare(
        model, data, task=task, labels=labels, examples=examples, max_length=max_length, device=device, dtype=dtype,
        unlabeled=unlabeled, columns=(column, token_column),
    )  # fmt: skip
    held_out = inputs.read(evaluation, loaded, (column, token_column), labels)
    scores = secateur.attribute(
        loaded.model, job, rows, criterion=chosen, unit=inputs.unit(unit), select=select, max_tokens=max_tokens,
        progress=output.batch_progress,
    )  # fmt: skip
    (batch,) = synthetic_batches(loaded.model, [batch_size], [length])
    points = sweep(
        loaded.model, job, scores, held_out, rates, batch, align=inputs.alignment(align, loaded.device), per_head=per_head,
        progress=output.step_progress,
        recovery=None if refit is None else lambda pruned: secateur.recover_(
            pruned, loaded.model, job, rows, method=refit, unlabeled=unlabeled, max_tokens=max_tokens
        ),
    )  # fmt: skip
    document = {"model": model, "criterion": scores.criterion, "points": [point.to_json() for point in points]}
    with new_folder(out) as folder:
        scores.save(folder / "scores.safetensors")
        (folder / "sweep.csv").write_text(to_csv(points))
        (folder / "sweep.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / "sweep.png").write_bytes(sweep_plot(points, f"{model}: {scores.criterion['criterion']}"))
    output.emit({**document, "out": str(out)}, as_json, output.points_table(points), f"written to {out}")
