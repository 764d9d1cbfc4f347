"""Candidates within a budget: plans and recoveries that are tried and, under a budget of time, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.attribution.scores import Scores
from secateur.data.examples import Example
from secateur.flow.choose import Candidate, Trials, alternatives_within, distance
from secateur.flow.effort import moved
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


def within_budget(
    model: nn.Module,
    task: Task,
    rows: Sequence[Example],
    scores: Sequence[Scores],
    budget: Budget,
    shapes: tuple[Sequence[int], Sequence[int]],
    recoveries: Sequence[Method | None],
    moves: int,
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
        scores: The scores of each criterion, all of the same sites.
        budget: The budget.
        shapes: Batch sizes and lengths.
        recoveries: The recoveries to try, as in `choose`.
        moves: The most plans to try by `moved`.
        max_tokens: Padded input tokens in a batch.
        say: Receives a line at each stage.
        progress: As in `compress`.
        options: Further arguments of `alternatives`.

    Returns:
        The candidates, best first, and how the budget of time was met; None under another budget.

    Raises:
        InputError: As `alternatives`, `choose` and `meet_latency` do.
    """
    if budget.measured:
        say("measuring what each site costs")
        options["table"] = latency_table(
            model, unit="channel" if any(site.is_channel for site in scores[0].sites) else "head",
            batch_size=max(shapes[0]), length=max(shapes[1]),
            progress=progress,
        )  # fmt: skip
    removable = options.pop("removable", ())
    plans = {plan: of_one for of_one in scores for plan in alternatives_within(of_one, budget, removable=removable, **options)}
    candidates = _tried(model, task, rows, plans, budget, recoveries, moves, max_tokens, progress, options)
    if not budget.measured:
        return candidates, None
    best = candidates[0]
    summary = best.plan.budget_json()
    options.update({name: summary[name] for name in ("allocation", "floor")})
    say("correcting by the whole model's time")

    def within(milliseconds: float) -> Plan:
        return _faster(best.plan, plans[best.plan], Budget("latency", milliseconds), options)

    met = meet_latency(
        model, within, options["table"],
        speedup=budget.amount if budget.kind == "speedup" else None,
        latency=budget.amount if budget.kind == "latency" else None, progress=progress,
    )  # fmt: skip
    return [replace(best, plan=met.plan), *candidates[1:]], met


def _tried(
    model: nn.Module,
    task: Task,
    rows: Sequence[Example],
    plans: dict[Plan, Scores],
    budget: Budget,
    recoveries: Sequence[Method | None],
    moves: int,
    max_tokens: int,
    progress: Progress | None,
    options: dict[str, Any],
) -> list[Candidate]:
    """Try the plans with the recoveries, and moves from the best one. Returns the candidates, best first.

    The scores of plans that the moves made are added to those of the plans.
    """
    if len(plans) == len(recoveries) == 1 and not moves:
        return [Candidate(next(iter(plans)), recoveries[0], None)]
    trials = Trials(model, task, rows, recoveries, unlabeled=without_targets(task, rows), max_tokens=max_tokens)
    candidates = trials.best_of(list(plans), recoveries, progress)
    best = candidates[0]
    for candidate, scaled in moved(trials, best, plans[best.plan], budget, moves, options, progress):
        plans[candidate.plan] = scaled
        candidates.append(candidate)
    return sorted(candidates, key=distance)


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
