"""Mixtures of single-task models are compared with all combinations of the models."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from secateur import InputError
from secateur.learned.multitask.mixture import Mixture, best, frontier

Models = dict[str, list[tuple[float, float]]]


def drawn(seed: int) -> Models:
    """Draw a few models of one to four tasks, with whole numbers, so that sums are often equal."""
    random = Random(seed)
    tasks = "abcd"[: random.randint(1, 4)]
    return {task: [(random.randint(1, 8), random.randint(0, 8)) for _ in range(random.randint(1, 5))] for task in tasks}


def every(models: Models) -> list[Mixture]:
    """List all combinations of one model for each task."""
    mixtures = []
    for numbers in product(*(range(len(points)) for points in models.values())):
        chosen = dict(zip(models, numbers, strict=True))
        points = [models[task][number] for task, number in chosen.items()]
        mixtures.append(Mixture(sum(weights for weights, _ in points), sum(score for _, score in points) / len(points), chosen))
    return mixtures


@pytest.mark.parametrize("seed", range(60))
def test_the_best_of_all_combinations_at_every_budget(seed: int) -> None:
    models = drawn(seed)
    combinations = every(models)
    for budget in range(1, 33):
        scores = [mixture.score for mixture in combinations if mixture.weights <= budget]
        best_mixture = best(models, budget)
        if best_mixture is None:
            assert scores == []
            continue
        assert best_mixture.score == pytest.approx(max(scores), abs=1e-9)
        assert best_mixture.weights <= budget
        # `chosen` names the models of the mixture.
        (chosen,) = (mixture for mixture in combinations if mixture.chosen == best_mixture.chosen)
        assert chosen.weights == best_mixture.weights
        assert chosen.score == pytest.approx(best_mixture.score)


@pytest.mark.parametrize("seed", range(60))
def test_the_frontier_has_what_no_other_beats(seed: int) -> None:
    models = drawn(seed)
    combinations, mixtures = every(models), frontier(models)
    unbeaten = {
        (one.weights, round(one.score, 9))
        for one in combinations
        if not any(
            other.weights <= one.weights
            and other.score >= one.score - 1e-9
            and (other.weights < one.weights or other.score > one.score + 1e-9)
            for other in combinations
        )
    }
    assert [(mixture.weights, round(mixture.score, 9)) for mixture in mixtures] == sorted(unbeaten)
    assert all(set(mixture.chosen) == set(models) for mixture in mixtures)


def test_a_budget_is_met_to_the_last_weight() -> None:
    models = {"a": [(0.1, 1.0), (0.2, 2.0)], "b": [(0.2, 1.0)]}
    # 0.2 + 0.2 in floats, too.
    for budget, score, chosen in ((0.3, 1.0, {"a": 0, "b": 0}), (0.4, 1.5, {"a": 1, "b": 0})):
        mixture = best(models, budget)
        assert mixture is not None
        assert mixture.weights == pytest.approx(budget)
        assert mixture.score == pytest.approx(score)
        assert mixture.chosen == chosen
    assert best(models, 0.29) is None


def test_a_task_without_models_is_refused() -> None:
    with pytest.raises(InputError, match=r"^models: expected at least one for every task, got none for 'b'$"):
        frontier({"a": [(1, 1)], "b": []})
