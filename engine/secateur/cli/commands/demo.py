"""`secateur demo`: the whole flow on the built-in model and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import secateur
from secateur.cli.shared import inputs, output
from secateur.cli.shared.options import (
    Json,
    Threads,
    UnitOption,
)
from secateur.cli.shared.plots import sweep_plot
from secateur.data import builtin
from secateur.flow.loaded import load_model, make_task
from secateur.flow.sweep import sweep, to_csv
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.sites import AttentionUnit
from secateur.support.errors import InputError
from secateur.support.files import new_folder

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
BATCH_SIZE, LENGTH = 32, 64
REFITTED = 300  # Examples that the out-projections are refitted on.


def run(out: Path, name: str, keep: float, unit: AttentionUnit) -> tuple[dict[str, Any], list[Table | str]]:
    """Score the built-in model on one task's calibration examples, prune it at several rates and compare the results on the
    task's test examples. Write the model pruned at `keep` with the sweep's table and plot. Returns the document and what to
    show of it."""
    if name not in builtin.tasks():
        raise InputError(f"task: expected one of {', '.join(builtin.tasks())}, got {name!r}")
    with new_folder(out) as folder:
        loaded = load_model("builtin", task=None, device="auto", dtype="auto")
        rows = inputs.read(f"builtin:{name}", loaded)
        held_out = inputs.read(f"builtin:{name}.test", loaded)
        task = make_task(loaded, "auto", rows, None)
        scores = secateur.attribute(loaded.model, task, rows, unit=unit, progress=output.batch_progress)
        (batch,) = synthetic_batches(loaded.model, [BATCH_SIZE], [LENGTH])
        points = sweep(
            loaded.model, task, scores, held_out, KEEPS, batch, per_head=True, progress=output.step_progress,
            recovery=lambda pruned: secateur.recover_(loaded.model, pruned, task, rows[:REFITTED]),
        )  # fmt: skip
        compressed = secateur.compress(
            loaded, rows[:REFITTED], task, plan=secateur.plan(scores, keep=keep, per_head=True), recoveries=["least_squares"],
            evaluation=held_out, out=folder / "model", batch_sizes=[1, 8, BATCH_SIZE], lengths=[LENGTH], say=output.say,
        )  # fmt: skip
        document = {
            "task": name,
            "unit": unit,
            "refitted": REFITTED,
            "batch": {"size": BATCH_SIZE, "tokens": LENGTH},
            "sweep": [point.to_json() for point in points],
            "pruned": {**compressed.to_json(), "out": str(out / "model")},
        }
        scores.save(folder / "scores.safetensors")
        (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / "sweep.csv").write_text(to_csv(points))
        (folder / "sweep.png").write_bytes(sweep_plot(points, f"built-in T5 pruned for {name!r}, out-projections refitted"))
    kind = f"labels {', '.join(task.labels)}" if task.labels else "open targets"
    head = (
        f"Task {name!r} ({kind}): {len(rows)} examples to score on, {REFITTED} of them to refit on, {len(held_out)} to test "
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


def demo(
    out: Annotated[Path, typer.Option(help="Output folder; must not exist yet.")] = Path("demo-out"),
    task: Annotated[str, typer.Option(help="Which of the built-in tasks.")] = "language",
    unit: UnitOption = "channel",
    keep: Annotated[float, typer.Option(help="The rate at which the pruned model is written.")] = 0.5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The whole flow on the built-in model and data."""
    inputs.use_threads(threads)
    document, shown = run(out, task, keep, inputs.unit(unit))
    output.emit(document, as_json, *shown)
