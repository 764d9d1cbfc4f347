"""The first half of `secateur prune`: which plan and which recovery, picked by trying, and for a latency by measuring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.attribution.scores import Scores
from secateur.data.examples import Example
from secateur.flow.choose import Candidate, alternatives, choose
from secateur.flow.meet_latency import MetLatency, meet_latency
from secateur.measuring.latency import latency_table
from secateur.planning.budget import the_budget
from secateur.planning.plan import Plan, plan
from secateur.recovery import Method
from secateur.support.errors import InputError
from secateur.tasks import Task
from secateur.tasks.base import without_targets

Say = Callable[[str], None]
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]  # Wraps an iteration, given its length and a word for it.


def tried(
    model: nn.Module,
    task: Task,
    rows: Sequence[Example],
    plans: Sequence[Plan],
    recoveries: Sequence[Method | None],
    max_tokens: int,
    progress: Progress,
) -> list[Candidate]:
    """The plans with the recoveries, best first."""
    return choose(
        model, task, plans, rows, recoveries=recoveries, unlabeled=without_targets(task, rows), max_tokens=max_tokens,
        progress=lambda pairs, total: progress(pairs, total, "trying"),
    )  # fmt: skip


def within_budget(
    model: nn.Module,
    task: Task,
    rows: Sequence[Example],
    scores: Scores,
    budget: Mapping[str, float | None],
    shapes: tuple[Sequence[int], Sequence[int]],
    recoveries: Sequence[Method | None],
    max_tokens: int,
    say: Say,
    progress: Progress,
    **options: Any,
) -> tuple[list[Candidate], MetLatency | None]:
    """The candidates under a budget, best first. Where it is a latency or a speed-up, at the largest of the shapes, the first
    one's plan is corrected until its model delivers, and how is told too. options: what else `alternatives` takes."""
    name, value = the_budget(**budget)
    if name not in ("speedup", "latency"):
        return tried(
            model, task, rows, alternatives(scores, **{**options, name: value}), recoveries, max_tokens, progress
        ), None
    say("measuring what each site costs")
    table = latency_table(
        model, unit="channel" if any(site.is_channel for site in scores.sites) else "head",
        batch_size=max(shapes[0]), length=max(shapes[1]),
        progress=lambda widths, total: progress(widths, total, "widths"),
    )  # fmt: skip
    options["table"] = table
    candidates = tried(model, task, rows, alternatives(scores, **{**options, name: value}), recoveries, max_tokens, progress)
    best = candidates[0]
    options.update({how: best.plan.budget[how] for how in ("allocation", "floor")})
    say("correcting by the whole model's time")
    met = meet_latency(
        model, lambda milliseconds: plan(scores, latency=milliseconds, **options), table,
        **{name: value},  # type: ignore[arg-type]
    )  # fmt: skip
    return [replace(best, plan=met.plan), *candidates[1:]], met


def between_rounds(budget: Mapping[str, float | None], rounds: int) -> dict[str, float]:
    """The budget that the rounds of scoring come closer to: in FLOPs where a speed-up is asked for."""
    name, value = the_budget(**budget)
    if name == "latency" and rounds > 1:
        raise InputError(f"rounds: expected 1 with a latency, whose share is not known before it is measured, got {rounds}")
    return {"flops": 1 / value} if name == "speedup" else {name: value}
