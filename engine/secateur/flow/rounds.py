"""attribute_in_rounds: prune some, score again what is left, as often as one likes."""

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
from secateur.planning.budget import the_budget
from secateur.planning.plan import Plan, plan
from secateur.pruning.masked import masked
from secateur.support.errors import InputError
from secateur.tasks import Task


def attribute_in_rounds(
    model: nn.Module,
    task: Task,
    examples: Examples,
    rounds: int,
    budget: Mapping[str, float],
    *,
    planning: Mapping[str, Any] | None = None,
    **options: Any,
) -> Scores:
    """Scores of the model as the plans of earlier rounds have masked it: what a unit does once others are gone.

    Each round takes the same factor of what is left, so that the last one's scores serve for the budget, such as
    {"flops": 0.5}. planning: what else `plan` takes in the rounds between, where it is a knapsack that leaves every site one
    unit otherwise. options: what else `attribute` takes. Units that a
    round has removed score below all others. The model is untouched.
    Raises InputError: fewer rounds than one, a checkpoint, and as `plan` and `attribute` do.
    """
    if rounds < 1:
        raise InputError(f"rounds: expected one at least, got {rounds}")
    if options.get("checkpoint") is not None:
        raise InputError("checkpoint: expected none for rounds, whose sums are of different masked models")
    name, value = the_budget(**budget)
    how = {} if name == "keep" else {"allocation": "knapsack", "floor": ONE_UNIT}
    made: Plan | None = None
    for number in range(1, rounds + 1):
        with nullcontext() if made is None else masked(model, made):
            scores = attribute(model, task, examples, **options)
        if made is not None:
            scores = _below(scores, made)
        if number < rounds:
            made = plan(scores, **{**how, **(planning or {}), name: value ** (number / rounds)})
    return scores


def _below(scores: Scores, made: Plan) -> Scores:
    """Units that the plan removes, below those that it keeps."""
    units = {}
    for site, values in scores.items():
        gone = torch.ones(len(values), dtype=torch.bool)
        gone[made[site]] = False
        units[site] = values.masked_fill(gone, min(0.0, float(values.min())) - gone.any().item())
    return replace(scores, by_site=units)
