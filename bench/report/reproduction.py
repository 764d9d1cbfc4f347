"""The tables and figures of docs/results/reproduction.md, from the committed cells of runs of `secateur reproduce`.

python -m bench.report.reproduction ap|multitask|ldnet RUN     takes the cells of the run in the folder RUN to bench/results/
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bench.support.provenance import RESULTS
from bench.support.tables import result
from secateur.reproduction.ap import claims, figures, grid, report, results
from secateur.reproduction.ldnet import claims as ldnet_claims
from secateur.reproduction.ldnet import figures as ldnet_figures
from secateur.reproduction.ldnet import grid as ldnet_grid
from secateur.reproduction.ldnet import report as ldnet_report
from secateur.reproduction.ldnet import results as ldnet_results
from secateur.reproduction.multitask import claims as multitask_claims
from secateur.reproduction.multitask import figures as multitask_figures
from secateur.reproduction.multitask import grid as multitask_grid
from secateur.reproduction.multitask import report as multitask_report
from secateur.reproduction.multitask import results as multitask_results


def take(name: str, run: Path) -> None:
    """Copy a run's cells as CSV, and write its settings, environment and claims as JSON."""
    shutil.copy(run / "cells.csv", RESULTS / f"reproduce-{name}.csv")
    document = json.loads((run / "cells.json").read_text())
    about = {part: document[part] for part in ("settings", "environment", "claims")}
    (RESULTS / f"reproduce-{name}.json").write_text(json.dumps(about, indent=1) + "\n")


def reproduction() -> str:
    """Make the page's part on attribution-based pruning."""
    settings, means = _attribution_runs()
    return "\n".join(report.lines(means, settings, claims.claims(means, settings), images="../images/ap-"))


def reproduction_plots() -> dict[str, bytes]:
    """Draw the figures of attribution-based pruning: PNG files by name."""
    settings, means = _attribution_runs()
    return _prefixed("ap", figures.draw(means, settings, result("reproduce-ap")["environment"]))


def multitask_runs() -> multitask_results.Results:
    """Read the committed runs of pruning with a multitask objective."""
    settings = multitask_grid.Settings.from_json(result("reproduce-multitask")["settings"])
    words = {"tasks", "method", "granularity", "scope", "scores", "low"}
    return multitask_results.Results(_cells("multitask", words), settings)


def reproduction_multitask() -> str:
    """Make the page's part on pruning with a multitask objective."""
    runs = multitask_runs()
    return "\n".join(multitask_report.lines(runs, multitask_claims.claims(runs), images="../images/multitask-"))


def reproduction_multitask_plots() -> dict[str, bytes]:
    """Draw the figures of pruning with a multitask objective: PNG files by name."""
    return _prefixed("multitask", multitask_figures.draw(multitask_runs(), result("reproduce-multitask")["environment"]))


def reproduction_ldnet() -> str:
    """Make the page's part on LD-Net."""
    runs = _ldnet_runs()
    return "\n".join(ldnet_report.lines(runs, ldnet_claims.claims(runs), images="../images/ldnet-"))


def reproduction_ldnet_plots() -> dict[str, bytes]:
    """Draw the figures of LD-Net: PNG files by name."""
    return _prefixed("ldnet", ldnet_figures.draw(_ldnet_runs(), result("reproduce-ldnet")["environment"]))


def _attribution_runs() -> tuple[grid.Settings, results.Results]:
    """The settings and the means of the committed run of attribution-based pruning."""
    recorded = result("reproduce-ap")["settings"]
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}
    settings = grid.Settings(**fields)
    return settings, results.Results(_cells("ap", {"scored", "tested", "criterion", "sites", "metric"}))


def _ldnet_runs() -> ldnet_results.Results:
    """The committed runs of LD-Net."""
    settings = ldnet_grid.Settings.from_json(result("reproduce-ldnet")["settings"])
    return ldnet_results.Results(_cells("ldnet", {"lm", "task", "metric", *ldnet_results.LISTS}), settings)


def _prefixed(name: str, pngs: dict[str, bytes]) -> dict[str, bytes]:
    """The figures under the names that the page links to."""
    return {f"{name}-{file}": png for file, png in pngs.items()}


def _cells(name: str, words: Collection[str]) -> list[dict[str, Any]]:
    """Read the rows of a CSV. Columns outside `words` are numbers, or None where the field is empty."""
    with open(RESULTS / f"reproduce-{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value if key in words else float(value) if value else None for key, value in row.items()} for row in rows]


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]))
