"""The finished cells of a run on pruning with a multitask objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.learned.multitask.mixture import Mixture, best
from secateur.reproduction.multitask.grid import Cell, Settings

Setting = tuple[str, str, str]


class Results:
    """The metrics of each cell.

    Args:
        rows: The finished cells: the fields of each cell and its measures.
        settings: The run's settings.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], settings: Settings) -> None:
        self.settings = settings
        names = list(Cell(()).to_json())
        self._rows = {tuple(row[name] for name in names): row for row in rows}

    def mean(self, cell: Cell) -> float | None:
        """Return the mean metric over a cell's tasks, or None if the cell is not finished."""
        row = self._row(cell)
        return None if row is None else float(row["mean"])

    def of(self, cell: Cell, task: str) -> float | None:
        """Return a cell's metric on one of its tasks, or None if the cell is not finished."""
        row = self._row(cell)
        return None if row is None else float(row[f"value_{task}"])

    def curve(self, setting: Setting, **cell: Any) -> list[tuple[float, float]]:
        """Return the shared models' means over the tasks by density.

        Args:
            setting: Method, granularity and scope.
            cell: The cells' other fields.

        Returns:
            Pairs of the requested density and the mean. Densities without a finished cell are left out.
        """
        tasks = self.settings.tasks
        means = [(d, self.mean(Cell(tasks, *setting, d, **cell))) for d in self.settings.densities[setting[1]]]
        return [(density, mean) for density, mean in means if mean is not None]

    def mixture(self, setting: Setting, budget: float) -> Mixture | None:
        """Find the best ensemble of pruned single-task models.

        Args:
            setting: Method, granularity and scope of all models.
            budget: The largest number of weights of all models together, as a share of one encoder's weights.

        Returns:
            The ensemble, or None if none fits the budget or a task has no finished model.
        """
        models = {task: self._singles(setting, task) for task in self.settings.tasks}
        return best(models, budget) if all(models.values()) else None

    def _singles(self, setting: Setting, task: str) -> Sequence[tuple[float, float]]:
        """List the (density, metric) of a task's finished single-task models."""
        cells = [Cell((task,), *setting, density) for density in self.settings.single_densities[setting[1]]]
        return [(cell.density, mean) for cell in cells if (mean := self.mean(cell)) is not None]

    def _row(self, cell: Cell) -> Mapping[str, Any] | None:
        """Return the row of a cell, or None if it is not finished."""
        return self._rows.get(tuple(cell.to_json().values()))
