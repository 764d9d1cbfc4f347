"""Metrics with their 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.support.html import html_table


@dataclass(frozen=True, repr=False)
class Evaluation:
    """A metric with its 95% interval.

    Attributes:
        metric: The name of the metric.
        value: Its value.
        low: The lower end of the interval.
        high: The upper end of the interval.
        examples: The number of examples, or of words for the accuracy of words.
        also: A second metric of the same outputs, None where there is none.
    """

    metric: str
    value: float
    low: float
    high: float
    examples: int
    also: Evaluation | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, `also` only where there is a second metric."""
        return {name: value for name, value in asdict(self).items() if name != "also" or value is not None}

    @property
    def metrics(self) -> list[Evaluation]:
        """This metric, and the second one where there is one."""
        return [self] if self.also is None else [self, self.also]

    def __repr__(self) -> str:
        return f"Evaluation({self})"

    def _repr_html_(self) -> str:
        rows = [(one.metric, f"{one.value:.4f}", f"{one.low:.4f} to {one.high:.4f}", one.examples) for one in self.metrics]
        return html_table("Evaluation", ("metric", "value", "95% interval", "examples"), rows)

    def __str__(self) -> str:
        figures = ", ".join(f"{one.metric} {one.value:.4f} [{one.low:.4f}, {one.high:.4f}]" for one in self.metrics)
        return f"{figures} on {self.examples} examples"


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


def correlations(outputs: Sequence[float], wanted: Sequence[float]) -> Evaluation:
    """Return Pearson's correlation of a model's outputs with the wanted values, and Spearman's, which is that of their ranks.

    A correlation is 0 where the outputs or the values are all equal. Equal numbers share their mean rank.
    """
    x, y = np.asarray(outputs, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    spearman = bootstrap("Spearman", len(x), lambda rows: _correlation(_ranks(x[rows]), _ranks(y[rows])))
    pearson = bootstrap("Pearson", len(x), lambda rows: _correlation(x[rows], y[rows]))
    return replace(pearson, also=spearman)


def f1_scores(predicted: Tensor, wanted: Tensor) -> Evaluation:
    """Return the micro F1 of sets of labels, and the macro F1, which is the mean of the labels' own F1.

    An F1 is 0 where a label is neither predicted nor wanted.

    Args:
        predicted: Whether each label is predicted for each example, bool [examples, labels].
        wanted: Whether it is right, bool [examples, labels].
    """
    both, either = (predicted & wanted).numpy(), (predicted.int() + wanted.int()).numpy()  # Right ones, and 2 TP + FP + FN.

    def micro(rows: list[int]) -> float:
        return float(2 * both[rows].sum() / max(1, either[rows].sum()))

    def macro(rows: list[int]) -> float:
        return float((2 * both[rows].sum(0) / np.maximum(1, either[rows].sum(0))).mean())

    count = len(predicted)
    return replace(bootstrap("micro F1", count, micro), also=bootstrap("macro F1", count, macro))


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return Pearson's correlation of two samples, 0 if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each value. Equal values share their mean rank."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[number]
    return ranks
