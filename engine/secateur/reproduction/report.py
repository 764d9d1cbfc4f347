"""What a run leaves behind: its cells as CSV and JSON, the figures, and a report with the claims."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.files import write_atomically
from secateur.reproduction.ap import STACKS, Settings
from secateur.reproduction.claims import RATE, Claim, claims
from secateur.reproduction.figures import draw
from secateur.reproduction.results import Results


def write(folder: Path, rows: Sequence[Mapping[str, Any]], settings: Settings, about: Mapping[str, Any]) -> list[Claim]:
    """Writes cells.csv, cells.json, a PNG for each experiment and report.md; returns the claims. about: the environment."""
    results = Results(rows)
    found = claims(results, settings)
    document = {
        "settings": settings.to_json(), "environment": about, "claims": [claim.to_json() for claim in found], "cells": rows,
    }  # fmt: skip
    write_atomically(folder / "cells.json", json.dumps(document, indent=1) + "\n")
    write_atomically(folder / "cells.csv", _csv(rows))
    for name, png in draw(results, settings).items():
        write_atomically(folder / name, png)
    title = "# Attribution-based pruning (arXiv 2205.04157), reproduced\n\n"
    write_atomically(folder / "report.md", title + "\n".join(lines(results, settings, found)) + "\n")
    return found


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def lines(results: Results, settings: Settings, found: Sequence[Claim], images: str = "") -> Iterator[str]:
    """The report in Markdown, without its title. images: what the names of the figures' files begin with."""
    scored, tested = settings.examples or "all", settings.tested or "all"
    yield (
        f"Model {settings.model}; tasks {', '.join(settings.tasks)}; {scored} examples of each to score on, {tested} to test "
        f"on; attention pruned by {settings.unit}; what is random is the mean of {settings.draws} draws."
    )
    yield ""
    yield "| the paper's claim | the paper | this run | held |"
    yield "|---|---|---|---|"
    for claim in found:
        yield f"| {claim.claim} | {claim.paper} | {claim.ours} | {'yes' if claim.held else '**no**'} |"
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
    yield f"| criterion | {' | '.join(settings.tasks)} | mean |"
    yield "|---|" + "--:|" * (len(settings.tasks) + 1)
    yield _line("dense", [results.dense(task) for task in settings.tasks])
    for criterion in settings.criteria:
        cells = [results.at(scored=t, tested=t, criterion=criterion, **{stack: RATE[stack]}) for t in settings.tasks]
        yield _line(criterion, [float("nan") if cell is None else cell.value for cell in cells])


def _by_rate(results: Results, settings: Settings, stack: str) -> Iterator[str]:
    yield f"| criterion | {' | '.join(map(str, settings.rates))} |"
    yield "|---|" + "--:|" * len(settings.rates)
    for criterion in settings.criteria:
        curves = [dict(results.curve(stack, settings.rates, scored=t, tested=t, criterion=criterion)) for t in settings.tasks]
        means = [statistics.mean(curve[rate].value for curve in curves) for rate in settings.rates]
        yield f"| {criterion} | {' | '.join(f'{mean:.3f}' for mean in means)} |"


def _line(name: str, values: Sequence[float]) -> str:
    return f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} | {sum(values) / len(values):.3f} |"
