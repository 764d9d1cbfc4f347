"""The claims of the paper on pruning with a multitask objective, and whether they hold in a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from secateur.reproduction.multitask.grid import ATTRIBUTION, MAGNITUDE, ZEROS, Cell
from secateur.reproduction.multitask.results import Results, Setting
from secateur.reproduction.shared.claim import Claim

# Three-task averages at equal total budgets, digitised from the paper's figure: at a density, multitask against mixture.
PAPER = {
    "element": "at .10 81.9 against 78.7, .30 83.1 and 81.7, .50 83.8 and 82.0, .70 84.6 and 82.3",
    "rank": "at .076 74.2 against 50.6, .226 82.6 and 71.1, .376 83.9 and 72.5",
}
MNLI = "MNLI at .10: movement 79.8 global, 79.2 local; magnitude 69.1 global, 73.5 local"


def claims(results: Results) -> list[Claim]:
    """Check the paper's claims that the run's experiments are about.

    Args:
        results: The finished cells.

    Returns:
        The claims, with the paper's and the run's figures.

    References:
        Xia and Shin 2021, arXiv 2112.05705.
    """
    checks = {
        "settings": [_movement_is_better, _magnitude_prefers_local, _movement_prefers_global],
        "mixture": [_multitask_beats_mixture],
        "low-resource": [_few_examples_gain],
        "initial-scores": [_attribution_start_is_better],
    }
    return [claim for name in results.settings.experiments for check in checks[name] for claim in check(results)]


def _multitask_beats_mixture(results: Results) -> Iterator[Claim]:
    """Check that one multitask model beats the best ensemble at every density."""
    for setting in results.settings.mixture:
        comparisons = []
        for density, ours in results.curve(setting):
            mixture = results.mixture(setting, density)
            if mixture is not None:
                comparisons.append((density, ours, mixture.score))
        if comparisons:
            yield Claim(
                f"{', '.join(setting)}: one multitask model beats the best ensemble of single-task models at the same total "
                "budget, at every density",
                PAPER[setting[1]],
                ", ".join(f"at {density:g} {ours:.3f} against {theirs:.3f}" for density, ours, theirs in comparisons),
                all(ours > theirs for _, ours, theirs in comparisons),
            )


def _movement_is_better(results: Results) -> Iterator[Claim]:
    """Check that movement beats magnitude, by element at the lowest density."""
    density = results.settings.densities["element"][0]
    means = {
        method: statistics.mean(_at(results, (method, "element", scope), density) for scope in ("global", "local"))
        for method in ("movement", "magnitude")
    }
    yield Claim(
        f"element-wise at {density:g}: movement keeps more than magnitude, as a mean of both scopes",
        MNLI,
        f"{means['movement']:.3f} against {means['magnitude']:.3f}",
        means["movement"] > means["magnitude"],
    )


def _magnitude_prefers_local(results: Results) -> Iterator[Claim]:
    """Check that magnitude is better with local scope."""
    yield _better_scope(results, "magnitude", "local", "global")


def _movement_prefers_global(results: Results) -> Iterator[Claim]:
    """Check that movement is better with global scope."""
    yield _better_scope(results, "movement", "global", "local")


def _better_scope(results: Results, method: str, better: str, worse: str) -> Claim:
    """Check that one scope of a method keeps more than the other, by element at the lowest density."""
    density = results.settings.densities["element"][0]
    high, low = (_at(results, (method, "element", scope), density) for scope in (better, worse))
    return Claim(
        f"element-wise {method} at {density:g}: {better} scope keeps more than {worse}",
        MNLI,
        f"{high:.3f} against {low:.3f}",
        high > low,
    )


def _few_examples_gain(results: Results) -> Iterator[Claim]:
    """Check that a task with few examples gains from the other tasks, dense and pruned."""
    settings = results.settings
    kinds = {"dense": Cell(()), f"pruned to {settings.low_density:g}": Cell((), *settings.low_setting, settings.low_density)}
    for kind, cell in kinds.items():
        comparisons = []
        for task in settings.tasks:
            alone, shared = (
                results.of(Cell(tasks, *cell.setting, cell.density, low=task), task) for tasks in ((task,), settings.tasks)
            )
            if alone is not None and shared is not None:
                comparisons.append((task, alone, shared))
        if comparisons:
            with_others = statistics.mean(shared for _, _, shared in comparisons)
            without = statistics.mean(alone for _, alone, _ in comparisons)
            yield Claim(
                f"{kind}: a task with {settings.few} examples gains from the others, as a mean over the tasks",
                "nine tasks, rank 38: 71.2 together, 58.2 each alone (all sizes)",
                f"{with_others:.3f} with, {without:.3f} without ("
                + ", ".join(f"{task} {shared:.3f} and {alone:.3f}" for task, alone, shared in comparisons)
                + ")",
                with_others > without,
            )


def _attribution_start_is_better(results: Results) -> Iterator[Claim]:
    """Check that movement scores should start from attribution."""
    for granularity in ("element", "rank"):
        setting = ("movement", granularity, "global")
        attributed = results.curve(setting, scores=ATTRIBUTION)
        for start, name in ((ZEROS, "zero"), (MAGNITUDE, "magnitude")):
            other = results.curve(setting, scores=start)
            if other and attributed:
                yield Claim(
                    f"movement, {granularity}, global: scores that start from attribution keep more than those that start "
                    f"from {name}, as a mean over the densities",
                    "not in the paper",
                    ", ".join(f"at {d:g} {b:.3f} against {a:.3f}" for (d, a), (_, b) in zip(other, attributed, strict=True)),
                    statistics.mean(b for _, b in attributed) > statistics.mean(a for _, a in other),
                )


def _at(results: Results, setting: Setting, density: float) -> float:
    """Return the mean of a shared model; NaN if its cell is not finished."""
    mean = results.mean(Cell(results.settings.tasks, *setting, density))
    return float("nan") if mean is None else mean
