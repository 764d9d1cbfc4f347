"""LD-Net's finished runs by cell."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from secateur.reproduction.ldnet.grid import Cell, Settings

# Of a row, those that are lists, which a CSV has as JSON.
LISTS = ("gates", "detached")


class Results:
    """What each cell came to. rows: of the ledger, or of the CSV with its numbers read."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], settings: Settings) -> None:
        self.settings = settings
        self._rows = {Cell(row["lm"], row["task"], row["wanted"]): {**row, **_lists(row)} for row in rows}
        # The split that claims are about.
        self.split = "test" if "test" in settings.files else "dev"

    def row(self, cell: Cell) -> Mapping[str, Any]:
        """All that was measured. Raises KeyError for a cell that was not run."""
        return self._rows[cell]

    def score(self, cell: Cell) -> float:
        """The metric in percent on the split that claims are about."""
        return 100 * float(self.row(cell)[self.split])

    def loss(self, cell: Cell) -> float:
        """How many points a pruned tagger is below the whole one that it began as."""
        return self.score(Cell(cell.lm, cell.task)) - self.score(cell)

    def shrinkage(self, cell: Cell) -> float:
        """FLOPs a word of the whole tagger over those of the pruned one."""
        return float(self.row(Cell(cell.lm, cell.task))["flops"] / self.row(cell)["flops"])


def _lists(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: json.loads(row[name]) if isinstance(row[name], str) and row[name] else row[name] or None for name in LISTS}
