"""docs/reproduction.md's tables and figures, from the committed cells of a run of `secateur reproduce ap`.

python bench/readme_reproduction.py RUN     takes the cells of the run in the folder RUN to bench/results/
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tables import RESULTS, ROOT, result

from secateur.reproduction.ap.claims import claims
from secateur.reproduction.ap.figures import draw
from secateur.reproduction.ap.grid import Settings
from secateur.reproduction.ap.report import lines
from secateur.reproduction.ap.results import Results

PAGE = ROOT / "docs" / "reproduction.md"


def take(run: Path) -> None:
    """The cells as CSV; the settings and the environment as JSON."""
    shutil.copy(run / "cells.csv", RESULTS / "ap.csv")
    document = json.loads((run / "cells.json").read_text())
    about = {name: document[name] for name in ("settings", "environment", "claims")}
    (RESULTS / "ap.json").write_text(json.dumps(about, indent=1) + "\n")


def reproduction() -> str:
    """The page's part that is made from results; draws the figures beside the page."""
    found = result("ap")
    settings = Settings(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in found["settings"].items()}
    )
    results = Results(cells())
    for name, png in draw(results, settings).items():
        (PAGE.parent / f"ap-{name}").write_bytes(png)
    return "\n".join(lines(results, settings, claims(results, settings), images="ap-"))


def cells() -> list[dict[str, Any]]:
    numbers = {"encoder": float, "decoder": float, "examples": int, "draw": int, "value": float}
    with open(RESULTS / "ap.csv", newline="") as file:
        return [{name: numbers.get(name, str)(value) for name, value in row.items()} for row in csv.DictReader(file)]


if __name__ == "__main__":
    take(Path(sys.argv[1]))
