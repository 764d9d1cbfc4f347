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


def write(folder: Path, rows: Sequence[Mapping[str, Any]], settings: Settings, about: Mapping[str, Any]) -> list[Claim]:
    """Writes cells.csv, cells.json, a PNG for each experiment and report.md; returns the claims. about: the environment."""
    results = Results(rows, settings)
    found = claims(results)
    title = "Pruning with a multitask objective (arXiv 2112.05705), reproduced"
    write_run(folder, title, rows, settings.to_json(), about, found, draw(results), lines(results, found))
    return found


def lines(results: Results, found: Sequence[Claim], images: str = "") -> Iterator[str]:
    """The report in Markdown, without its title. images: what the names of the figures' files begin with."""
    settings = results.settings
    length = f"{settings.steps} steps for each task" if settings.steps else f"{settings.epochs:g} epochs"
    examples = "all" if settings.examples is None else f"{settings.examples:,}"
    yield (
        f"Model {settings.model}; tasks {', '.join(settings.tasks)}; {examples} examples of each, {length} of "
        f"{settings.batch_size} examples; seed {settings.seed}."
    )
    yield ""
    yield from claims_table(found)
    if "settings" in settings.experiments:
        for granularity in ("element", "rank"):
            yield ""
            yield from _by_density(results, granularity)
    for name in settings.experiments:
        yield ""
        yield f"![{name}]({images}{name}.png)"


def _by_density(results: Results, granularity: str) -> Iterator[str]:
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
    return "" if value is None else f"{value:.3f}"
