"""The best ensemble of single-task models within a total budget, to compare one multitask model with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur.support.errors import InputError


@dataclass(frozen=True)
class Mixture:
    """An ensemble of single-task models, one for each task.

    Attributes:
        weights: The number of weights of all its models together, in the unit of the given models.
        score: The mean score over the tasks.
        chosen: For each task, the position of the chosen model among the task's models.
    """

    weights: float
    score: float
    chosen: dict[str, int]


def frontier(models: Mapping[str, Sequence[tuple[float, float]]]) -> list[Mixture]:
    """Find the Pareto frontier of mixtures: those that no other mixture beats with as few weights.

    The result is exact, because a mixture of some tasks that is beaten cannot be part of a best mixture of all tasks.

    Args:
        models: For each task, the (weights, score) of each of its single-task models.

    Returns:
        The mixtures, by rising weights and rising score.

    Raises:
        InputError: A task has no model.

    References:
        Xia and Shin 2021, arXiv 2112.05705 (the mixture of single-task models).
    """
    mixtures = [Mixture(0.0, 0.0, {})]
    for task, points in models.items():
        if not points:
            raise InputError(f"models: expected at least one for every task, got none for {task!r}")
        extended = [
            Mixture(part.weights + weights, part.score + score / len(models), {**part.chosen, task: number})
            for part in mixtures
            for number, (weights, score) in enumerate(points)
        ]
        mixtures = _unbeaten(extended)
    return mixtures


def best(models: Mapping[str, Sequence[tuple[float, float]]], budget: float) -> Mixture | None:
    """Find the mixture with the highest mean score within a budget.

    Args:
        models: For each task, the (weights, score) of each of its single-task models.
        budget: The largest number of weights of all models together, in the unit of `models`.

    Returns:
        The mixture, or None if no mixture fits the budget.

    Raises:
        InputError: A task has no model.
    """
    within = [mixture for mixture in frontier(models) if mixture.weights <= budget * (1 + 1e-9)]
    return within[-1] if within else None


def _unbeaten(mixtures: Sequence[Mixture]) -> list[Mixture]:
    """Keep the mixtures that score higher than every mixture with as few or fewer weights."""
    unbeaten: list[Mixture] = []
    for candidate in sorted(mixtures, key=lambda mixture: (mixture.weights, -mixture.score)):
        if not unbeaten or candidate.score > unbeaten[-1].score:
            unbeaten.append(candidate)
    return unbeaten
