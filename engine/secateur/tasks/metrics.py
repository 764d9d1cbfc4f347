"""Metrics with their 95% intervals."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Evaluation:
    """A metric with its 95% interval.

    Attributes:
        metric: The name of the metric.
        value: Its value.
        low: The lower end of the interval.
        high: The upper end of the interval.
        examples: The number of examples, or of words for the accuracy of words.
    """

    metric: str
    value: float
    low: float
    high: float
    examples: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4f} [{self.low:.4f}, {self.high:.4f}] on {self.examples} examples"


def proportion(metric: str, right: int, total: int) -> Evaluation:
    """Return the share `right` / `total` with Wilson's 95% score interval (Wilson 1927)."""
    z = 1.959964
    p = right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return Evaluation(metric, p, max(0.0, centre - half), min(1.0, centre + half), total)


def bootstrap(metric: str, examples: int, statistic: Any) -> Evaluation:
    """Return a statistic of the examples' indices with a 95% percentile interval over 200 seeded resamples."""
    generator = torch.Generator().manual_seed(0)
    value = float(statistic(list(range(examples))))
    draws = sorted(float(statistic(torch.randint(examples, (examples,), generator=generator).tolist())) for _ in range(200))
    return Evaluation(metric, value, draws[4], draws[194], examples)
