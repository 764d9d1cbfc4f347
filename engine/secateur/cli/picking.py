"""The first half of `secateur prune`: which plan and which recovery, picked by trying, and for a latency by measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import secateur
from secateur.choosing import Candidate, alternatives
from secateur.cli import inputs, output
from secateur.data import Example
from secateur.errors import InputError
from secateur.latency.meeting import MetLatency
from secateur.planning import Plan, the_budget
from secateur.recovery import Method
from secateur.scores import Scores
from secateur.tasks import Task


def tried(
    loaded: inputs.Loaded,
    task: Task,
    rows: Sequence[Example],
    plans: Sequence[Plan],
    recoveries: Sequence[Method | None],
    max_tokens: int,
) -> list[Candidate]:
    """The plans with the recoveries, best first."""
    return secateur.choose(
        loaded.model, task, plans, rows, recoveries=recoveries, unlabeled=without_targets(task, rows), max_tokens=max_tokens,
        progress=lambda pairs, total: output.step_progress(pairs, total, "trying"),
    )  # fmt: skip


def within_budget(
    loaded: inputs.Loaded,
    task: Task,
    rows: Sequence[Example],
    scores: Scores,
    budget: Mapping[str, float | None],
    shapes: tuple[Sequence[int], Sequence[int]],
    recoveries: Sequence[Method | None],
    max_tokens: int,
    **options: Any,
) -> tuple[list[Candidate], MetLatency | None]:
    """The candidates under a budget, best first. Where it is a latency or a speed-up, at the largest of the shapes, the first
    one's plan is corrected until its model delivers, and how is told too. options: what else `alternatives` takes."""
    name, value = the_budget(**budget)
    if name not in ("speedup", "latency"):
        return tried(loaded, task, rows, alternatives(scores, **{**options, name: value}), recoveries, max_tokens), None
    output.say("measuring what each site costs")
    table = secateur.latency_table(
        loaded.model, unit="channel" if any(site.unit.endswith("channel") for site in scores.sites) else "head",
        batch_size=max(shapes[0]), length=max(shapes[1]),
        progress=lambda widths, total: output.step_progress(widths, total, "widths"),
    )  # fmt: skip
    options["table"] = table
    candidates = tried(loaded, task, rows, alternatives(scores, **{**options, name: value}), recoveries, max_tokens)
    best = candidates[0]
    options.update({how: best.plan.budget[how] for how in ("allocation", "floor")})
    output.say("correcting by the whole model's time")
    met = secateur.meet_latency(
        loaded.model, lambda milliseconds: secateur.plan(scores, latency=milliseconds, **options), table,
        **{"speedup" if name == "speedup" else "target_ms": value},  # type: ignore[arg-type]
    )  # fmt: skip
    return [replace(best, plan=met.plan), *candidates[1:]], met


def between_rounds(budget: Mapping[str, float | None], rounds: int) -> dict[str, float]:
    """The budget that the rounds of scoring come closer to: in FLOPs where a speed-up is asked for."""
    name, value = the_budget(**budget)
    if name == "latency" and rounds > 1:
        raise InputError(f"rounds: expected 1 with a latency, whose share is not known before it is measured, got {rounds}")
    return {"flops": 1 / value} if name == "speedup" else {name: value}


def without_targets(task: Task, rows: Sequence[Example]) -> bool:
    """Whether examples are inputs alone."""
    return task.columns[-1] not in rows[0]
