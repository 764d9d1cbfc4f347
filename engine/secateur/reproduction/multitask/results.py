"""The finished runs by cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.learned.multitask.mixture import Mixture, best
from secateur.reproduction.multitask.grid import Cell, Settings

Setting = tuple[str, str, str]


class Results:
    """What each cell came to."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], settings: Settings) -> None:
        self.settings = settings
        names = list(Cell(()).to_json())
        self._rows = {tuple(row[name] for name in names): row for row in rows}

    def mean(self, cell: Cell) -> float | None:
        """Over the cell's tasks, or None where it was not run."""
        row = self._row(cell)
        return None if row is None else float(row["mean"])

    def of(self, cell: Cell, task: str) -> float | None:
        """Of one of its tasks."""
        row = self._row(cell)
        return None if row is None else float(row[f"value_{task}"])

    def curve(self, setting: Setting, **cell: Any) -> list[tuple[float, float]]:
        """(density asked for, mean over the tasks) of the shared models."""
        tasks = self.settings.tasks
        found = [(d, self.mean(Cell(tasks, *setting, d, **cell))) for d in self.settings.densities[setting[1]]]
        return [(density, mean) for density, mean in found if mean is not None]

    def mixture(self, setting: Setting, budget: float) -> Mixture | None:
        """The best ensemble of pruned single-task models that together hold at most `budget` of one encoder's weights."""
        models = {task: self._singles(setting, task) for task in self.settings.tasks}
        return best(models, budget) if all(models.values()) else None

    def _singles(self, setting: Setting, task: str) -> Sequence[tuple[float, float]]:
        cells = [Cell((task,), *setting, density) for density in self.settings.single_densities[setting[1]]]
        return [(cell.density, mean) for cell in cells if (mean := self.mean(cell)) is not None]

    def _row(self, cell: Cell) -> Mapping[str, Any] | None:
        return self._rows.get(tuple(cell.to_json().values()))
