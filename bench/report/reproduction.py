"""docs/reproduction.md's tables and figures, from the committed cells of runs of `secateur reproduce`.

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

from bench.support.provenance import RESULTS, ROOT
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

PAGE = ROOT / "docs" / "reproduction.md"


def take(name: str, run: Path) -> None:
    """The cells as CSV; the settings and the environment as JSON."""
    shutil.copy(run / "cells.csv", RESULTS / f"reproduce-{name}.csv")
    document = json.loads((run / "cells.json").read_text())
    about = {part: document[part] for part in ("settings", "environment", "claims")}
    (RESULTS / f"reproduce-{name}.json").write_text(json.dumps(about, indent=1) + "\n")


def ap_runs() -> tuple[results.Results, grid.Settings]:
    """Return the committed runs of attribution-based pruning and their settings."""
    recorded = result("reproduce-ap")["settings"]
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}
    settings = grid.Settings(**fields)
    return results.Results(_cells("ap", {"scored", "tested", "criterion", "sites", "metric"})), settings


def reproduction() -> str:
    """Return the page's part on attribution-based pruning."""
    means, settings = ap_runs()
    return "\n".join(report.lines(means, settings, claims.claims(means, settings), images="ap-"))


def multitask_runs() -> multitask_results.Results:
    """The committed runs of pruning with a multitask objective."""
    settings = multitask_grid.Settings.from_json(result("reproduce-multitask")["settings"])
    words = {"tasks", "method", "granularity", "scope", "scores", "low"}
    return multitask_results.Results(_cells("multitask", words), settings)


def reproduction_multitask() -> str:
    """The page's part on pruning with a multitask objective."""
    runs = multitask_runs()
    return "\n".join(multitask_report.lines(runs, multitask_claims.claims(runs), images="multitask-"))


def ldnet_runs() -> ldnet_results.Results:
    """Return the committed runs of LD-Net."""
    settings = ldnet_grid.Settings.from_json(result("reproduce-ldnet")["settings"])
    return ldnet_results.Results(_cells("ldnet", {"lm", "task", "metric", *ldnet_results.LISTS}), settings)


def reproduction_ldnet() -> str:
    """Return the page's part on LD-Net."""
    runs = ldnet_runs()
    return "\n".join(ldnet_report.lines(runs, ldnet_claims.claims(runs), images="ldnet-"))


def reproduction_plots() -> None:
    """Write the page's figures beside the page."""
    _draw("ap", figures.draw(*ap_runs()))
    _draw("multitask", multitask_figures.draw(multitask_runs()))
    _draw("ldnet", ldnet_figures.draw(ldnet_runs()))


def _draw(name: str, pngs: dict[str, bytes]) -> None:
    for file, png in pngs.items():
        (PAGE.parent / f"{name}-{file}").write_bytes(png)


def _cells(name: str, words: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a CSV; what is not among the words is a number, or nothing."""
    with open(RESULTS / f"reproduce-{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value if key in words else float(value) if value else None for key, value in row.items()} for row in rows]


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]))
