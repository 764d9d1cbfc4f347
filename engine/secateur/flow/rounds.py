"""attribute_in_rounds: prune a part, score what is left, and repeat."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.attribution.attribute import attribute
from secateur.attribution.scores import Scores
from secateur.data.examples import Examples
from secateur.planning.allocation import ONE_UNIT
from secateur.planning.budget import Budget
from secateur.planning.plan import Plan, plan_within
from secateur.pruning.masked import masked
from secateur.support.errors import InputError
from secateur.support.fields import shown
from secateur.tasks import Task

_MOST_ROUNDS = 1000


def attribute_in_rounds(
    model: nn.Module,
    task: Task,
    examples: Examples,
    rounds: int,
    budget: Budget | Mapping[str, float],
    *,
    planning: Mapping[str, Any] | None = None,
    **options: Any,
) -> Scores:
    """Score the model as the plans of earlier rounds have masked it: what a unit does once other units are gone.

    Each round removes the same factor of what is left, so that the scores of the last round serve for the whole budget. Units
    that a round has removed score below all other units of their site.

    Args:
        model: The dense model. It is left untouched.
        task: The task.
        examples: The examples to score on, as in `attribute`.
        rounds: How often to score. One round is `attribute`.
        budget: The budget after the last round: a `Budget`, or a mapping such as {"flops": 0.5}.
        planning: Further arguments of `plan` in the rounds before the last one. By default those plans are knapsacks that leave
            every site one unit, or uniform under `keep`.
        options: Further arguments of `attribute`.

    Returns:
        The scores of the last round.

    Raises:
        InputError: There are fewer rounds than one or more than 1000, a checkpoint is given, or `plan` or `attribute` raise it.

    Example:
        `secateur.attribute_in_rounds(model, task, examples, 3, {"flops": 0.5})`
    """
    require_rounds(rounds)
    if options.get("checkpoint") is not None:
        raise InputError("checkpoint: expected none for rounds, whose sums are of different masked models")
    budget = budget if isinstance(budget, Budget) else Budget.of(**budget)
    spread = {} if budget.kind == "keep" else {"allocation": "knapsack", "floor": ONE_UNIT}
    plan: Plan | None = None
    for number in range(1, rounds + 1):
        with nullcontext() if plan is None else masked(model, plan):
            scores = attribute(model, task, examples, **options)
        if plan is not None:
            scores = _below(scores, plan)
        if number < rounds:
            plan = plan_within(scores, budget.after(number, rounds), **{**spread, **(planning or {})})
    return scores


def require_rounds(rounds: int) -> None:
    """Check a number of rounds, each of which scores the whole model.

    Raises:
        InputError: There are fewer rounds than one, or more than 1000.
    """
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise InputError(f"rounds: expected one at least, got {shown(rounds)}")
    if rounds > _MOST_ROUNDS:
        raise InputError(f"rounds: expected at most {_MOST_ROUNDS}, got {rounds}")


def _below(scores: Scores, plan: Plan) -> Scores:
    """The scores, where the units that the plan removes score below those that it keeps."""
    by_site = {}
    for site, values in scores.items():  # values [units]
        gone = torch.ones(len(values), dtype=torch.bool)  # [units]
        gone[plan[site]] = False
        by_site[site] = values.masked_fill(gone, min(0.0, float(values.min())) - gone.any().item())
    return replace(scores, by_site=by_site)
