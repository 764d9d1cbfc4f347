"""`secateur demo`: score, prune and compare the built-in model on built-in data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import secateur
from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import (
    Json,
    Threads,
    UnitOption,
)
from secateur.cli.shared.plots import sweep_plot
from secateur.data import builtin
from secateur.flow.loaded import load_model, make_task, read_for
from secateur.flow.sweep import sweep, to_csv
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.sites import AttentionUnit
from secateur.support.environment import environment
from secateur.support.errors import InputError
from secateur.support.files import new_folder

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
BATCH_SIZE, LENGTH = 32, 64
REFITTED = 300  # The number of examples that the out-projections are refitted on.


def run(out: Path, name: str, keep: float, unit: AttentionUnit) -> tuple[dict[str, Any], list[Table | str]]:
    """Score the built-in model, prune it at several rates, and compare the results.

    The model is scored on the calibration examples of a task, and compared on its test examples. The folder gets the model
    pruned at `keep`, and the sweep's table and plot.

    Args:
        out: The folder, which must not exist yet.
        name: The built-in task.
        keep: The share of units that the written model keeps at every site.
        unit: The unit of attention.

    Returns:
        The JSON document, and the tables and lines to print.

    Raises:
        InputError: There is no built-in task of this name, or the folder exists.
    """
    if name not in builtin.tasks():
        raise InputError(f"task: expected one of {', '.join(builtin.tasks())}, got {name!r}")
    with new_folder(out) as folder:
        loaded = load_model("builtin", task=None, device="auto", dtype="auto")
        rows = read_for(loaded, f"builtin:{name}")
        held_out = read_for(loaded, f"builtin:{name}.test")
        task = make_task(loaded, "auto", rows, None)
        scores = secateur.attribute(loaded.model, task, rows, unit=unit, progress=bars())
        (batch,) = synthetic_batches(loaded.model, [BATCH_SIZE], [LENGTH])
        points = sweep(
            loaded.model, task, scores, held_out, KEEPS, batch, per_head=True, progress=bars(),
            recovery=lambda pruned: secateur.recover_(loaded.model, pruned, task, rows[:REFITTED]),
        )  # fmt: skip
        compressed = secateur.compress(
            loaded, rows[:REFITTED], task, plan=secateur.plan(scores, keep=keep, per_head=True), recoveries=["least_squares"],
            evaluation=held_out, out=folder / "model", batch_sizes=[1, 8, BATCH_SIZE], lengths=[LENGTH], say=output.say,
            progress=bars(),
        )  # fmt: skip
        document = {
            "task": name,
            "unit": unit,
            "refitted": REFITTED,
            "batch": {"size": BATCH_SIZE, "tokens": LENGTH},
            "sweep": [point.to_json() for point in points],
            "pruned": {**compressed.to_json(), "out": str(out / "model")},
        }
        title = f"built-in T5, {loaded.task} {name!r}, {unit}s, out-projections refitted"
        scores.save(folder / "scores.safetensors")
        (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / "sweep.csv").write_text(to_csv(points))
        (folder / "sweep.png").write_bytes(sweep_plot(points, title, environment(loaded.model), (BATCH_SIZE, LENGTH)))
    targets = f"labels {', '.join(task.labels)}" if task.labels else "open targets"
    head = (
        f"Task {name!r} ({targets}): {len(rows)} examples to score on, {REFITTED} of them to refit on, {len(held_out)} to test "
        f"on. Neurons and attention {unit}s are pruned at every layer; batch {BATCH_SIZE} x {LENGTH}"
    )
    return document, [
        head,
        "",
        output.points_table(points),
        "",
        f"The model at keep = {keep}:",
        *output.compared(compressed.comparison),
        *compressed.lines(),
        f"written to {out}: model/ (load it with secateur.load), report.json, sweep.csv, sweep.png, scores.safetensors",
    ]


@output.claims_out()
def demo(
    out: Annotated[Path, typer.Option(help="Output folder; it must not exist yet.")] = Path("demo-out"),
    task: Annotated[str, typer.Option(help=f"Built-in task: {', '.join(builtin.tasks())}.")] = "language",
    unit: UnitOption = "channel",
    keep: Annotated[float, typer.Option(help="Share of units that the written model keeps at every site.")] = 0.5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score, prune and compare the built-in model on built-in data; write the model with a report and a plot."""
    inputs.use_threads(threads)
    document, shown = run(out, task, keep, inputs.unit(unit))
    output.emit(document, as_json, *shown)
