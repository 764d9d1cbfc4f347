"""`secateur demo`: the whole flow on the built-in model and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

import secateur
from secateur import builtin
from secateur.benchmarking import synthetic_batches
from secateur.choosing import Candidate
from secateur.cli import inputs, output
from secateur.cli.pipeline import prune_folder
from secateur.errors import InputError
from secateur.files import new_folder
from secateur.plots import sweep_plot
from secateur.site import AttentionUnit
from secateur.sweeping import sweep, to_csv

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
BATCH_SIZE, LENGTH = 32, 64
REFITTED = 300  # Examples that the out-projections are refitted on.


def run(out: Path, name: str, keep: float, unit: AttentionUnit) -> tuple[dict[str, Any], list[Table | str]]:
    """Scores the built-in model on one task's calibration examples, prunes it at several rates, compares them on the task's
    test examples, and writes the model pruned at `keep` with the sweep's table and plot."""
    if name not in builtin.tasks():
        raise InputError(f"task: expected one of {', '.join(builtin.tasks())}, got {name!r}")
    with new_folder(out) as folder:
        loaded = inputs.load_model("builtin", task=None, device="auto", dtype="auto")
        rows = inputs.read(f"builtin:{name}", loaded)
        held_out = inputs.read(f"builtin:{name}.test", loaded)
        task = inputs.make_task(loaded, "auto", rows, None)
        scores = secateur.attribute(loaded.model, task, rows, unit=unit, progress=output.batch_progress)
        (batch,) = synthetic_batches(loaded.model, [BATCH_SIZE], [LENGTH])
        points = sweep(
            loaded.model, task, scores, held_out, KEEPS, batch, per_head=True, progress=output.step_progress,
            recovery=lambda pruned: secateur.recover_(pruned, loaded.model, task, rows[:REFITTED]),
        )  # fmt: skip
        plan = secateur.plan(scores, keep=keep, per_head=True)
        report, shown = prune_folder(
            loaded, task, [Candidate(plan, "least_squares", None)], folder / "model", rows=rows[:REFITTED], held_out=held_out,
            shapes=([1, 8, BATCH_SIZE], [LENGTH]),
        )  # fmt: skip
        document = {
            "task": name,
            "unit": unit,
            "refitted": REFITTED,
            "batch": {"size": BATCH_SIZE, "tokens": LENGTH},
            "sweep": [point.to_json() for point in points],
            "pruned": {**report, "out": str(out / "model")},
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
        *shown[:-1],
        f"written to {out}: model/ (load it with secateur.load), report.json, sweep.csv, sweep.png, scores.safetensors",
    ]
