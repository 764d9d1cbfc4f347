"""`secateur sweep`: measure accuracy, size and speed under several budgets of one kind."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, cast

import typer

import secateur
from secateur.attribution.pass_tokens import LEAST
from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import (
    Align,
    AllocationName,
    Chat,
    CriterionName,
    Data,
    Device,
    Dtype,
    Floor,
    InputColumn,
    Json,
    Kind,
    Labels,
    Limit,
    MaxLength,
    Model,
    Out,
    Over,
    PassTokens,
    PerHead,
    PromptText,
    Recover,
    Select,
    System,
    TargetColumn,
    TargetName,
    Threads,
    UnitOption,
    Unlabeled,
)
from secateur.cli.shared.plots import sweep_plot
from secateur.flow.sweep import sweep, to_csv
from secateur.measuring.synthetic import synthetic_batches
from secateur.planning.allocation import Allocation
from secateur.planning.budget import Budget, BudgetKind
from secateur.recovery.recover import require_methods
from secateur.support.environment import environment as secateur_environment
from secateur.support.errors import InputError
from secateur.support.files import new_folder

KEEPS = "0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2"


def _budgets(keeps: str | None, flops: str | None, speedup: str | None) -> list[Budget]:
    """The budgets of one kind. Raises InputError for two kinds."""
    given = {name: text for name, text in (("keeps", keeps), ("flops", flops), ("speedup", speedup)) if text is not None}
    if len(given) > 1:
        raise InputError(f"budget: expected exactly one of keeps, flops, speedup, got {', '.join(given)}")
    ((name, text),) = given.items() or {"keeps": KEEPS}.items()
    kind = cast(BudgetKind, "keep" if name == "keeps" else name)
    return [Budget(kind, amount) for amount in inputs.numbers(text, name, float)]


@output.claims_out()
def sweep_(
    model: Model,
    data: Data,
    out: Out,
    evaluation: Annotated[str, typer.Option("--eval", help="Held-out examples to evaluate on.")],
    keeps: Annotated[
        str | None, typer.Option(help=f"Shares of units to keep at every site, between commas; by default {KEEPS}.")
    ] = None,
    flops: Annotated[
        str | None, typer.Option(help="Instead of --keeps: shares of the layers' FLOPs that may remain, between commas.")
    ] = None,
    speedup: Annotated[
        str | None, typer.Option(help="Instead of --keeps: speed-ups that a latency table predicts, between commas.")
    ] = None,
    kind: Kind = None,
    labels: Labels = "auto",
    input_column: InputColumn = None,
    target_column: TargetColumn = None,
    prompt: PromptText = None,
    chat: Chat = False,
    system: System = None,
    unit: UnitOption = "head",
    select: Select = None,
    criterion: CriterionName = "gradient",
    target: TargetName = None,
    over_examples: Over = None,
    unlabeled: Unlabeled = False,
    examples: Limit = None,
    max_tokens: PassTokens = None,
    max_length: MaxLength = None,
    allocation: AllocationName = "uniform",
    floor: Floor = None,
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
    """Measure accuracy, size and speed under several budgets of one kind; write them as CSV, JSON and PNG."""
    inputs.use_threads(threads)
    (refit,) = inputs.recoveries(recover, tries=False)
    budgets = _budgets(keeps, flops, speedup)
    for budget in budgets:
        budget.check_spread(allocation, floor or 0.0)
    chosen = inputs.make_criterion(criterion, target, over_examples, unlabeled)
    options = inputs.data_options(input_column, target_column, (prompt, chat, system), labels, unlabeled)
    loaded, task, rows = inputs.prepare(
        model, data, options, task=kind, examples=examples, max_length=max_length, device=device, dtype=dtype
    )
    require_methods(loaded.model, [refit])
    (batch,) = synthetic_batches(loaded.model, [batch_size], [length])
    held_out = inputs.read(evaluation, loaded, replace(options, unlabeled=False))
    scores = secateur.attribute(
        loaded.model, task, rows, criterion=chosen, unit=inputs.unit(unit), select=select, max_tokens=max_tokens,
        progress=bars(),
    )  # fmt: skip
    table = None
    if budgets[0].measured:
        output.say("measuring what each site costs")
        table = secateur.latency_table(
            loaded.model, unit=inputs.unit(unit), batch_size=batch_size, length=length,
            progress=bars(),
        )  # fmt: skip
    width = inputs.alignment(align, loaded.device)
    points = sweep(
        loaded.model, task, scores, held_out, budgets, batch, table=table, allocation=cast(Allocation, allocation),
        floor=floor or 0.0, align=width, per_head=per_head,
        progress=bars(),
        recovery=None if refit is None else lambda pruned: secateur.recover_(
            loaded.model, pruned, task, rows, method=refit, unlabeled=unlabeled, max_tokens=max_tokens or LEAST
        ),
    )  # fmt: skip
    environment = secateur_environment(loaded.model)
    document = {
        "model": model, "task": loaded.task, "data": data, "eval": evaluation,
        "examples": len(rows), "evaluated": len(held_out),
        "criterion": scores.criterion, "unit": unit, "select": select, "recovery": recover,
        "plan": {"allocation": allocation, "floor": floor or 0.0, "align": width, "per_head": per_head},
        "batch": {"size": batch_size, "tokens": length}, "environment": environment,
        "points": [point.to_json() for point in points],
    }  # fmt: skip
    title = f"{model}, {loaded.task}, pruned by {scores.criterion['criterion']}, recovery {recover}"
    with new_folder(out) as folder:
        scores.save(folder / "scores.safetensors")
        (folder / "sweep.csv").write_text(to_csv(points))
        (folder / "sweep.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / "sweep.png").write_bytes(sweep_plot(points, title, environment, (batch_size, length)))
    output.emit({**document, "out": str(out)}, as_json, output.points_table(points), f"written to {out}")
