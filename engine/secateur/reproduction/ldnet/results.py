"""The finished cells of a run on LD-Net."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from secateur.reproduction.ldnet.grid import Cell, Settings
from secateur.reproduction.shared.claim import Estimate, combined

# The fields of a row that are lists. A CSV file holds them as JSON.
LISTS = ("gates", "detached")


class Results:
    """The measures of each cell.

    Args:
        rows: The rows of the ledger, or those of the CSV file with numbers parsed.
        settings: The run's settings.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], settings: Settings) -> None:
        self.settings = settings
        self._rows = {Cell(row["lm"], row["task"], row["wanted"]): {**row, **_lists(row)} for row in rows}
        # The split that the claims are checked on.
        self.split = "test" if "test" in settings.files else "dev"

    def row(self, cell: Cell) -> Mapping[str, Any]:
        """Return all measures of a cell. Raises KeyError if the cell is not finished."""
        return self._rows[cell]

    def score(self, cell: Cell) -> float:
        """Return the metric in percent on the split that the claims are checked on."""
        return 100 * float(self.row(cell)[self.split])

    def estimate(self, cell: Cell) -> Estimate:
        """Return the score with its 95% interval."""
        row = self.row(cell)
        return Estimate(*(100 * float(row[f"{self.split}{end}"]) for end in ("", "_low", "_high")))

    def loss(self, cell: Cell) -> Estimate:
        """Return by how many points a pruned tagger is worse than the whole tagger that it started from."""
        return combined([(1, self.estimate(Cell(cell.lm, cell.task))), (-1, self.estimate(cell))])

    def shrinkage(self, cell: Cell) -> float:
        """Return the FLOPs a word of the whole tagger divided by those of the pruned one."""
        return float(self.row(Cell(cell.lm, cell.task))["flops"] / self.row(cell)["flops"])


def _lists(row: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the lists of a row; an empty field becomes None."""
    return {name: json.loads(row[name]) if isinstance(row[name], str) and row[name] else row[name] or None for name in LISTS}
