"""The second half of `secateur prune`: rebuild, verify, evaluate, benchmark, write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

import secateur
from secateur.cli.shared import inputs, output
from secateur.cli.shared.plots import benchmark_plot, widths_plot
from secateur.data.examples import Example
from secateur.flow.choose import Candidate
from secateur.flow.meet_latency import MetLatency
from secateur.measuring.benchmark import Report, benchmark
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.cost import parameters
from secateur.pruning.verify import VerificationError, some_batches
from secateur.recovery import Method, Refit
from secateur.tasks import Task
from secateur.tasks.base import without_targets


def prune_folder(
    loaded: inputs.Loaded,
    task: Task,
    candidates: Sequence[Candidate],
    out: Path,
    *,
    rows: Sequence[Example],
    held_out: Sequence[Example] | None,
    shapes: tuple[Sequence[int], Sequence[int]],
    met: MetLatency | None = None,
) -> tuple[dict[str, Any], list[Table | str]]:
    """Carries the first candidate's plan out, checks it, recovers what it took if the candidate says so, and writes the folder:
    the model in the dtype that it was stored in, its tokenizer, plan.json, report.json and plots. Returns the report and
    what to show of it. met: how a latency was met, if one was asked for."""
    model, plan, recover = loaded.model, candidates[0].plan, candidates[0].recovery
    output.say("rebuilding and verifying")
    pruned = secateur.prune(model, plan)
    verification = secateur.verify(model, pruned, plan, task, some_batches(model, task, rows))
    if not verification.holds:
        raise VerificationError(f"nothing was written: {verification}")
    refits = [] if recover is None else _recovered(loaded, task, pruned, rows, recover)
    compared, tables, report = compare(model, pruned, task, held_out, shapes)
    document = {
        "plan": plan.summary(),
        "candidates": [candidate.to_json() for candidate in candidates],
        "met": None if met is None else met.to_json(),
        "verification": verification.to_json(),
        "recovery": [refit.to_json() for refit in refits],
        **compared,
        "out": str(out),
    }
    files: dict[str, str | bytes] = {"plan.json": plan.dumps(), "widths.png": widths_plot(plan, "what each layer keeps")}
    write_folder(loaded, task, pruned, out, document, report, files)
    shown: list[Table | str] = [
        *tables,
        *_choice(candidates),
        *_delivered(met),
        *_improvement(refits),
        str(verification),
        f"written to {out}",
    ]
    return document, shown


def compare(
    model: nn.Module,
    pruned: nn.Module,
    task: Task,
    held_out: Sequence[Example] | None,
    shapes: tuple[Sequence[int], Sequence[int]],
) -> tuple[dict[str, Any], list[Table | str], Report]:
    """Evaluates both models on what is held out, and times them: what the report says of it, what to show, and the timings."""
    metrics = {}
    if held_out is not None:
        output.say(f"evaluating on {len(held_out)} examples")
        metrics = {name: secateur.evaluate(m, task, held_out) for name, m in (("dense", model), ("pruned", pruned))}
    output.say("timing")
    report = benchmark(model, pruned, synthetic_batches(model, *shapes))
    document = {
        "evaluation": {name: metric.to_json() for name, metric in metrics.items()},
        "parameters": {"dense": parameters(model), "pruned": parameters(pruned)},
        "benchmark": report.to_json(),
    }
    rows = [output.sizes(model, pruned)]
    if metrics:
        rows.insert(0, (metrics["dense"].metric, f"{metrics['dense'].value:.4f}", f"{metrics['pruned'].value:.4f}"))
    return document, [output.comparison(rows), output.timings_table(report), *report.notes], report


def write_folder(
    loaded: inputs.Loaded,
    task: Task,
    pruned: nn.Module,
    out: Path,
    document: Mapping[str, Any],
    report: Report,
    files: Mapping[str, str | bytes],
) -> None:
    """The model folder, in the dtype that the model was stored in, its report, the plot of the timings and further files."""
    extra: dict[str, str | bytes] = {
        inputs.TASK_FILE: inputs.remember(loaded, task),
        "report.json": json.dumps(document, indent=1) + "\n",
        "benchmark.png": benchmark_plot(report, "dense against pruned"),
        **files,
    }
    secateur.save(pruned.to(loaded.stored), out, tokenizer=loaded.tokenizer, extra=extra)


def _recovered(loaded: inputs.Loaded, task: Task, pruned: nn.Module, rows: Sequence[Example], method: Method) -> list[Refit]:
    output.say(f"recovering on {len(rows)} examples")
    computed = next(pruned.parameters()).dtype
    refits = secateur.recover_(loaded.model, pruned, task, rows, method=method, unlabeled=without_targets(task, rows))
    pruned.to(loaded.stored).to(computed)  # What is evaluated is what is written. Other weights lose nothing by it.
    return refits


def _choice(candidates: Sequence[Candidate]) -> list[str]:
    if len(candidates) == 1:
        return []
    others = [f"  not: {candidate}" for candidate in candidates[1:]]
    return [f"picked as the closest on held-out examples: {candidates[0]}", *others]


def _delivered(met: MetLatency | None) -> list[str]:
    if met is None:
        return []
    timing, times = met.timing, len(met.history)
    return [
        f"delivered: {timing.speedup:.2f}x (quartiles {timing.speedup_low:.2f} to {timing.speedup_high:.2f}), "
        f"{timing.pruned_ms:.1f} ms at {timing.batch_size} x {timing.length}, after measuring {times} plan{'s' * (times > 1)}"
    ]


def _improvement(refits: Sequence[Refit]) -> list[str]:
    if not refits:
        return []
    before, after = (sum(getattr(refit, name) for refit in refits) / len(refits) for name in ("before", "after"))
    return [f"recovery: the branches' outputs were {before:.1%} off (squared, mean of {len(refits)}), are {after:.1%} off"]
