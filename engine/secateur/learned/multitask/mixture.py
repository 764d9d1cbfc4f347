"""The best ensemble of single-task models at a total budget: what one multitask model is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur.support.errors import InputError


@dataclass(frozen=True)
class Mixture:
    """weights: that all its models hold together. score: the mean over the tasks. chosen: by task, which of its models."""

    weights: float
    score: float
    chosen: dict[str, int]


def frontier(models: Mapping[str, Sequence[tuple[float, float]]]) -> list[Mixture]:
    """The mixtures, one model a task, that no other beats with as few weights; by rising weights and score.

    models: by task, (weights, score) of each single-task model (Xia and Shin 2021, arXiv 2112.05705: the mixture of
    single-task models). Exact: what is beaten on some of the tasks cannot be part of the best over all.
    Raises InputError where a task has no model.
    """
    found = [Mixture(0.0, 0.0, {})]
    for task, points in models.items():
        if not points:
            raise InputError(f"models: expected at least one of each task, got none of {task!r}")
        sums = [
            Mixture(part.weights + weights, part.score + score / len(models), {**part.chosen, task: number})
            for part in found
            for number, (weights, score) in enumerate(points)
        ]
        found = _unbeaten(sums)
    return found


def best(models: Mapping[str, Sequence[tuple[float, float]]], budget: float) -> Mixture | None:
    """The mixture with the highest mean score whose models hold at most `budget` weights, or None where none does."""
    within = [mixture for mixture in frontier(models) if mixture.weights <= budget * (1 + 1e-9)]
    return within[-1] if within else None


def _unbeaten(mixtures: Sequence[Mixture]) -> list[Mixture]:
    found: list[Mixture] = []
    for mixture in sorted(mixtures, key=lambda each: (each.weights, -each.score)):
        if not found or mixture.score > found[-1].score:
            found.append(mixture)
    return found
