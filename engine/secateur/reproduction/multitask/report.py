"""The report on pruning with a multitask objective: claims, tables, figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.reproduction.multitask.claims import claims
from secateur.reproduction.multitask.figures import draw
from secateur.reproduction.multitask.grid import EIGHT, Cell, Settings
from secateur.reproduction.multitask.results import Results
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
    results = Results(rows, settings)
    checked = claims(results)
    title = "Pruning with a multitask objective (arXiv 2112.05705), reproduced"
    figures = draw(results, environment)
    write_run(folder, title, rows, settings.to_json(), environment, checked, figures, lines(results, checked))
    return checked


def lines(results: Results, checked: Sequence[Claim], images: str = "") -> Iterator[str]:
    """Write the report in Markdown, without its title.

    Args:
        results: The finished cells.
        checked: The claims.
        images: A prefix of the figures' file names.

    Yields:
        The lines.
    """
    settings = results.settings
    length = f"{settings.steps} steps for each task" if settings.steps else f"{settings.epochs:g} epochs"
    examples = "all" if settings.examples is None else f"{settings.examples:,}"
    yield (
        f"Model {settings.model}; tasks {', '.join(settings.tasks)}; {examples} examples of each, {length} of "
        f"{settings.batch_size} examples; seed {settings.seed}."
    )
    yield ""
    yield from claims_table(checked)
    yield ""
    yield "Each value is of one training run without an interval, so no claim is undecided."
    if "settings" in settings.experiments:
        for granularity in ("element", "rank"):
            yield ""
            yield from _by_density(results, granularity)
    for name in settings.experiments:
        yield ""
        yield f"![{name}]({images}{name}.png)"


def _by_density(results: Results, granularity: str) -> Iterator[str]:
    """Write the means by setting and density."""
    settings = results.settings
    densities = settings.densities[granularity]
    yield f"Mean over the tasks by density, pruned by {granularity}:"
    yield ""
    yield f"| setting | {' | '.join(f'{density:g}' for density in densities)} |"
    yield "|---|" + "--:|" * len(densities)
    for setting in EIGHT:
        if setting[1] == granularity:
            curve = dict(results.curve(setting))
            yield f"| {setting[0]}, {setting[2]} | {' | '.join(_cell(curve.get(density)) for density in densities)} |"
    yield f"| dense | {' | '.join([_cell(results.mean(Cell(settings.tasks)))] * len(densities))} |"


def _cell(value: float | None) -> str:
    """Write a table cell; it is empty without a value."""
    return "" if value is None else f"{value:.3f}"
