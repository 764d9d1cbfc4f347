"""The finished cells of a run as accuracies, averaged over draws."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Mean:
    """The mean accuracy over the draws of one cell, its standard deviation, and the number of draws."""

    value: float
    deviation: float
    draws: int


class Results:
    """Accuracies by cell, averaged over draws.

    Args:
        rows: The finished cells: the fields of each cell and its "value".
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        values_of: dict[tuple[Any, ...], list[float]] = {}
        for row in rows:
            values_of.setdefault(self._key(row), []).append(row["value"])
        self._means = {key: _mean(values) for key, values in values_of.items()}

    def at(self, **cell: Any) -> Mean | None:
        """Return the mean over the draws of a cell.

        Args:
            cell: The cell's fields; the others have their defaults.

        Returns:
            The mean, or None if no draw of the cell is finished.
        """
        return self._means.get(self._key({"encoder": 0.0, "decoder": 0.0, "sites": "", "examples": 0, **cell}))

    def dense(self, task: str) -> float:
        """Return the dense model's accuracy on a task. Raises KeyError if its cell is not finished."""
        mean = self.at(scored=task, tested=task, criterion="")
        if mean is None:
            raise KeyError(f"dense model on {task}")
        return mean.value

    def curve(self, stack: str, rates: Sequence[float], **cell: Any) -> list[tuple[float, Mean]]:
        """Return the means at rising rates of one stack.

        Args:
            stack: "encoder" or "decoder".
            rates: The rates.
            cell: The cells' other fields.

        Returns:
            Pairs of a rate and its mean. Rates without a finished cell are left out.
        """
        means = [(rate, self.at(**{stack: rate, **cell})) for rate in rates]
        return [(rate, mean) for rate, mean in means if mean is not None]

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        """Return the fields that tell cells apart, without the draw."""
        return tuple(row[name] for name in ("scored", "tested", "criterion", "encoder", "decoder", "sites", "examples"))


def _mean(values: Sequence[float]) -> Mean:
    """Average the draws of a cell."""
    return Mean(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))
