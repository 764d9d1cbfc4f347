"""The report on attribution-based pruning: claims, tables, figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.reproduction.ap.claims import RATE, claims
from secateur.reproduction.ap.figures import draw
from secateur.reproduction.ap.grid import STACKS, Settings
from secateur.reproduction.ap.results import Results
from secateur.reproduction.shared.claim import Claim, claims_table
from secateur.reproduction.shared.writing import write_run


def write(folder: Path, rows: Sequence[Mapping[str, Any]], settings: Settings, environment: Mapping[str, Any]) -> list[Claim]:
    """Write cells.csv, cells.json, a PNG for each experiment and report.md.

    Args:
        folder: The folder to write to.
        rows: The finished cells.
        settings: The run's settings.
        environment: The environment of the run.

    Returns:
        The claims, with the paper's and the run's figures.
    """
    results = Results(rows)
    checked = claims(results, settings)
    title = "Attribution-based pruning (arXiv 2205.04157), reproduced"
    figures = draw(results, settings, environment)
    write_run(folder, title, rows, settings.to_json(), environment, checked, figures, lines(results, settings, checked))
    return checked


def lines(results: Results, settings: Settings, checked: Sequence[Claim], images: str = "") -> Iterator[str]:
    """Write the report in Markdown, without its title.

    Args:
        results: The finished cells.
        settings: The run's settings.
        checked: The claims.
        images: A prefix of the figures' file names.

    Yields:
        The lines.
    """
    scored, tested = settings.examples or "all", settings.tested or "all"
    yield (
        f"Model {settings.model}; tasks {', '.join(settings.tasks)}; {scored} examples of each to score on, {tested} to test "
        f"on; attention pruned by {settings.unit}; random criteria are means of {settings.draws} draws."
    )
    yield ""
    yield from claims_table(checked)
    if "accuracy" in settings.experiments:
        for stack in STACKS:
            yield ""
            yield f"Accuracy with {RATE[stack]:.0%} of the {stack}'s units removed:"
            yield ""
            yield from _by_task(results, settings, stack)
            yield ""
            yield f"Mean accuracy over the tasks, against the share of the {stack}'s units removed:"
            yield ""
            yield from _by_rate(results, settings, stack)
    for name in settings.experiments:
        yield ""
        yield f"![{name}]({images}{name}.png)"


def _by_task(results: Results, settings: Settings, stack: str) -> Iterator[str]:
    """Write the accuracies by criterion and task, at the stack's rate in `RATE`."""
    yield f"| criterion | {' | '.join(settings.tasks)} | mean |"
    yield "|---|" + "--:|" * (len(settings.tasks) + 1)
    yield _line("dense", [results.dense(task) for task in settings.tasks])
    for criterion in settings.criteria:
        cells = [results.at(scored=t, tested=t, criterion=criterion, **{stack: RATE[stack]}) for t in settings.tasks]
        yield _line(criterion, [float("nan") if cell is None else cell.value for cell in cells])


def _by_rate(results: Results, settings: Settings, stack: str) -> Iterator[str]:
    """Write the mean accuracies over the tasks by criterion and rate."""
    yield f"| criterion | {' | '.join(map(str, settings.rates))} |"
    yield "|---|" + "--:|" * len(settings.rates)
    for criterion in settings.criteria:
        curves = [dict(results.curve(stack, settings.rates, scored=t, tested=t, criterion=criterion)) for t in settings.tasks]
        means = [statistics.mean(curve[rate].value for curve in curves) for rate in settings.rates]
        yield f"| {criterion} | {' | '.join(f'{mean:.3f}' for mean in means)} |"


def _line(name: str, values: Sequence[float]) -> str:
    """Write a table row of values and their mean."""
    return f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} | {sum(values) / len(values):.3f} |"
