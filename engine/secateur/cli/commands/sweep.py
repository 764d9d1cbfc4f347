"""`secateur sweep`: measure accuracy, size and speed at several rates of pruning."""

from __future__ import annotations

import json
from typing import Annotated

import typer

import secateur
from secateur.cli.shared import inputs, output
from secateur.cli.shared.options import (
    Align,
    Column,
    CriterionName,
    Data,
    Device,
    Dtype,
    Json,
    Kind,
    Labels,
    Limit,
    MaxLength,
    MaxTokens,
    Model,
    Out,
    Over,
    PerHead,
    Recover,
    Select,
    TargetName,
    Threads,
    TokenColumn,
    UnitOption,
    Unlabeled,
)
from secateur.cli.shared.plots import sweep_plot
from secateur.flow.sweep import sweep, to_csv
from secateur.measuring.synthetic import synthetic_batches
from secateur.support.files import new_folder


@output.claims_out()
def sweep_(
    model: Model,
    data: Data,
    out: Out,
    evaluation: Annotated[str, typer.Option("--eval", help="Held-out examples to evaluate on.")],
    keeps: Annotated[
        str, typer.Option(help="Shares of units to keep at every site, separated by commas.")
    ] = "0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2",
    kind: Kind = None,
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
    batch_size: Annotated[int, typer.Option(help="Examples in the timed batch.", min=1)] = 32,
    length: Annotated[int, typer.Option(help="Tokens of each example in the timed batch.", min=1)] = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy, size and speed at several rates of pruning; write them as CSV, JSON and PNG."""
    inputs.use_threads(threads)
    (refit,) = inputs.recoveries(recover, tries=False)
    rates = inputs.numbers(keeps, "keeps", float)
    chosen = inputs.make_criterion(criterion, target, over_examples, unlabeled)
    loaded, task, rows = inputs.prepare(
        model, data, task=kind, labels=labels, examples=examples, max_length=max_length, device=device, dtype=dtype,
        unlabeled=unlabeled, columns=(column, token_column),
    )  # fmt: skip
    (batch,) = synthetic_batches(loaded.model, [batch_size], [length])
    held_out = inputs.read(evaluation, loaded, (column, token_column), labels)
    scores = secateur.attribute(
        loaded.model, task, rows, criterion=chosen, unit=inputs.unit(unit), select=select, max_tokens=max_tokens,
        progress=output.batch_progress,
    )  # fmt: skip
    points = sweep(
        loaded.model, task, scores, held_out, rates, batch, align=inputs.alignment(align, loaded.device), per_head=per_head,
        progress=output.step_progress,
        recovery=None if refit is None else lambda pruned: secateur.recover_(
            loaded.model, pruned, task, rows, method=refit, unlabeled=unlabeled, max_tokens=max_tokens
        ),
    )  # fmt: skip
    document = {"model": model, "criterion": scores.criterion, "points": [point.to_json() for point in points]}
    with new_folder(out) as folder:
        scores.save(folder / "scores.safetensors")
        (folder / "sweep.csv").write_text(to_csv(points))
        (folder / "sweep.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / "sweep.png").write_bytes(sweep_plot(points, f"{model}: {scores.criterion['criterion']}"))
    output.emit({**document, "out": str(out)}, as_json, output.points_table(points), f"written to {out}")
