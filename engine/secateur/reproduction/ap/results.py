"""The finished cells of a run as accuracies, averaged over draws."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Mean:
    """Of the draws of one cell: mean accuracy, standard deviation, and how many draws."""

    value: float
    deviation: float
    draws: int


class Results:
    """Accuracies by cell, averaged over draws."""

    def __init__(self, rows: Iterable[Row]) -> None:
        found: dict[tuple[Any, ...], list[float]] = {}
        for row in rows:
            found.setdefault(self._key(row), []).append(row["value"])
        self._means = {key: _mean(values) for key, values in found.items()}

    def at(self, **cell: Any) -> Mean | None:
        """Of the cells with these fields and the others' defaults, or None where there is none."""
        return self._means.get(self._key({"encoder": 0.0, "decoder": 0.0, "sites": "", "examples": 0, **cell}))

    def dense(self, task: str) -> float:
        """The dense model's accuracy on a task."""
        found = self.at(scored=task, tested=task, criterion="")
        if found is None:
            raise KeyError(f"dense model on {task}")
        return found.value

    def curve(self, stack: str, rates: Sequence[float], **cell: Any) -> list[tuple[float, Mean]]:
        """Against the rate of one stack; rates without a cell are left out."""
        found = [(rate, self.at(**{stack: rate, **cell})) for rate in rates]
        return [(rate, mean) for rate, mean in found if mean is not None]

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("scored", "tested", "criterion", "encoder", "decoder", "sites", "examples"))


def _mean(values: Sequence[float]) -> Mean:
    return Mean(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))
