"""Candidates within a budget: plans and recoveries that are tried and, under a budget of time, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.attribution.scores import Scores
from secateur.data.examples import Example
from secateur.flow.choose import Candidate, alternatives_within, choose
from secateur.flow.meet_latency import MetLatency, meet_latency
from secateur.measuring.latency import latency_table
from secateur.planning.budget import Budget
from secateur.planning.plan import Plan, plan_within, plans_alike
from secateur.planning.shapes import ALIKE
from secateur.recovery import Method
from secateur.support.errors import InputError
from secateur.support.progress import Progress
from secateur.tasks import Task
from secateur.tasks.base import without_targets

Say = Callable[[str], None]  # Receives a line about the step that begins.


def tried(
    model: nn.Module,
    task: Task,
    rows: Sequence[Example],
    plans: Sequence[Plan],
    recoveries: Sequence[Method | None],
    max_tokens: int,
    progress: Progress | None,
) -> list[Candidate]:
    """The plans with the recoveries, best first, as `choose` finds them."""
    return choose(
        model, task, plans, rows, recoveries=recoveries, unlabeled=without_targets(task, rows), max_tokens=max_tokens,
        progress=progress,
    )  # fmt: skip


def within_budget(
    model: nn.Module,
    task: Task,
    rows: Sequence[Example],
    scores: Scores,
    budget: Budget,
    shapes: tuple[Sequence[int], Sequence[int]],
    recoveries: Sequence[Method | None],
    max_tokens: int,
    say: Say,
    progress: Progress | None,
    **options: Any,
) -> tuple[list[Candidate], MetLatency | None]:
    """Find the candidates within a budget.

    Under a budget of time, a latency table is measured at the largest of the shapes, and the best candidate's plan is corrected
    until its model delivers.

    Args:
        model: The dense model.
        task: The task.
        rows: The examples that the units were scored on.
        scores: The scores.
        budget: The budget.
        shapes: Batch sizes and lengths.
        recoveries: The recoveries to try, as in `choose`.
        max_tokens: Padded input tokens in a batch.
        say: Receives a line at each stage.
        progress: As in `compress`.
        options: Further arguments of `alternatives`.

    Returns:
        The candidates, best first, and how the budget of time was met; None under another budget.

    Raises:
        InputError: As `alternatives`, `choose` and `meet_latency` do.
    """
    if not budget.measured:
        return tried(model, task, rows, alternatives_within(scores, budget, **options), recoveries, max_tokens, progress), None
    say("measuring what each site costs")
    table = latency_table(
        model, unit="channel" if any(site.is_channel for site in scores.sites) else "head",
        batch_size=max(shapes[0]), length=max(shapes[1]),
        progress=progress,
    )  # fmt: skip
    options["table"] = table
    candidates = tried(model, task, rows, alternatives_within(scores, budget, **options), recoveries, max_tokens, progress)
    best = candidates[0]
    summary = best.plan.budget_json()
    options.update({name: summary[name] for name in ("allocation", "floor")})
    options.pop("removable", None)
    say("correcting by the whole model's time")
    met = meet_latency(
        model, lambda milliseconds: _faster(best.plan, scores, Budget("latency", milliseconds), options), table,
        speedup=budget.amount if budget.kind == "speedup" else None,
        latency=budget.amount if budget.kind == "latency" else None, progress=progress,
    )  # fmt: skip
    return [replace(best, plan=met.plan), *candidates[1:]], met


def _faster(best: Plan, scores: Scores, budget: Budget, options: dict[str, Any]) -> Plan:
    """The plan of the best one's kind within another time: where layers are alike, without the same blocks."""
    if options.get("shape") not in ALIKE:
        return plan_within(scores, budget, **options)
    return plans_alike(scores, budget, removed_blocks=best.removed_blocks, **options)[0]


def between_rounds(budget: Budget, rounds: int) -> Budget:
    """The budget that the rounds of scoring approach: a share of the FLOPs in place of a speed-up.

    Raises:
        InputError: There are several rounds under a latency.
    """
    if budget.kind == "latency" and rounds > 1:
        raise InputError(f"rounds: expected 1 with a latency, whose share is not known before it is measured, got {rounds}")
    return Budget("flops", 1 / budget.amount) if budget.kind == "speedup" else budget
