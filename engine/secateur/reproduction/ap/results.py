"""The finished cells of a run as accuracies, averaged over draws."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.reproduction.shared.claim import Estimate, averaged

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Mean:
    """The mean accuracy over the draws of one cell, its standard deviation, the number of draws, and the 95% interval.

    The draws are tested on the same examples, so the interval is the mean of theirs. It is the value where rows have none.
    """

    value: float
    deviation: float
    draws: int
    low: float
    high: float

    @property
    def estimate(self) -> Estimate:
        """The value with its interval."""
        return Estimate(self.value, self.low, self.high)


class Results:
    """Accuracies by cell, averaged over draws.

    Args:
        rows: The finished cells: the fields of each cell, its "value", and the interval's "low" and "high".
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        values_of: dict[tuple[Any, ...], list[Estimate]] = {}
        for row in rows:
            estimate = Estimate(row["value"], row.get("low", row["value"]), row.get("high", row["value"]))
            values_of.setdefault(self._key(row), []).append(estimate)
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
        return self.dense_mean(task).value

    def dense_mean(self, task: str) -> Mean:
        """Return the dense model's accuracy on a task with its interval. Raises KeyError if its cell is not finished."""
        mean = self.at(scored=task, tested=task, criterion="")
        if mean is None:
            raise KeyError(f"dense model on {task}")
        return mean

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


def _mean(draws: Sequence[Estimate]) -> Mean:
    """Average the draws of a cell."""
    values, mean = [draw.value for draw in draws], averaged(draws)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Mean(statistics.mean(values), deviation, len(values), mean.low, mean.high)
