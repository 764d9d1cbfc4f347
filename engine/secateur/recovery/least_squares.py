"""Least squares from sums over tokens: moments, the ridge with the least error on held-out tokens, and the step it gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-9, 3))  # As shares of the mean eigenvalue of the matrix.
# A [k, k] and B [m, k] of the problem whose steps X [m, k] minimise tr(X A X^T) - 2 tr(X B^T).
Equations = tuple[Tensor, Tensor]


class Moments:
    """Float64 sums over tokens: of inputs h [k] and target outputs y [d], of their products, and of |y|^2."""

    def __init__(self) -> None:
        self.tokens, self._sums = 0, list[Tensor]()

    def add(self, h: Tensor, y: Tensor) -> None:
        """Add n tokens: inputs h [n, k] and target outputs y [n, d]."""
        h, y = h.double(), y.double()
        sums = [h.T @ h, y.T @ h, h.sum(0), y.sum(0), y.square().sum()]  # [k, k], [d, k], [k], [d], []
        self._sums = [mine + other for mine, other in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.tokens += len(h)

    def plus(self, other: Moments) -> Moments:
        """Return the moments of the tokens of both."""
        both = Moments()
        both.tokens = self.tokens + other.tokens
        both._sums = [mine + theirs for mine, theirs in zip(self._sums, other._sums, strict=True)]
        return both

    @property
    def size(self) -> float:
        """The sum of |y|^2."""
        return float(self._sums[4])

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The means of h [k] and of y [d]."""
        return self._sums[2] / self.tokens, self._sums[3] / self.tokens

    def about(self, means: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return sum h h^T [k, k] and sum y h^T [d, k], of differences from the means if means are given."""
        inputs, crossed, h, y, _ = self._sums
        if means is None:
            return inputs, crossed
        of_h, of_y = means
        outer = torch.outer(of_h, h)
        inputs = inputs - outer - outer.T + self.tokens * torch.outer(of_h, of_h)
        crossed = crossed - torch.outer(of_y, h) - torch.outer(y, of_h) + self.tokens * torch.outer(of_y, of_h)
        return inputs, crossed

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return sum |y - W h - b|^2 for a weight W [d, k] and a bias b [d]."""
        inputs, crossed, h, y, size = self._sums
        error = (weight @ inputs * weight).sum() - 2 * (weight * crossed).sum() + size
        if bias is not None:
            error += self.tokens * bias.square().sum() + 2 * (bias * (weight @ h - y)).sum()
        return max(0.0, float(error))  # Rounding can make it negative.


def best_ridge(folds: Sequence[tuple[Equations, Equations]]) -> tuple[float | None, float]:
    """Return the ridge whose steps, each fitted to some tokens, have the least error on the tokens held out from them.

    In the eigenbasis of A a ridge r turns B into the step B / (values + r). So the errors of all ridges on the held-out tokens
    follow from one quadratic form in 1 / (values + r).

    Args:
        folds: For each fold the equations of the fitted tokens, and those of the held-out tokens.

    Returns:
        The ridge as a share of the mean eigenvalue, and by how much its error is larger than that of no step, summed over the
            folds: a negative number. None and 0 where no step is better than none.
    """
    errors = [0.0] * len(RIDGES)
    for (matrix, missing), (of_held_out, target) in folds:
        values, vectors = torch.linalg.eigh(matrix)  # [k], [k, k]
        missing, target = missing @ vectors, target @ vectors  # [m, k] each
        curvature = (missing.T @ missing) * (vectors.T @ of_held_out @ vectors)  # [k, k]
        slope = (missing * target).sum(0)  # [k]
        for number, ridge in enumerate(RIDGES):
            steps = 1 / (values.clamp(min=0) + ridge * _scale(matrix))
            errors[number] += float(steps @ curvature @ steps - 2 * (slope @ steps))
    best, least = None, 0.0
    for ridge, error in zip(RIDGES, errors, strict=True):
        if error < 0 and error <= least:
            best, least = ridge, error
    return best, least


def step(matrix: Tensor, missing: Tensor, ridge: float) -> Tensor:
    """Return the step X [m, k] that minimises tr(X A X^T) - 2 tr(X B^T) + ridge |X|^2.

    Directions in the null space of A stay 0.

    Args:
        matrix: A [k, k].
        missing: B [m, k].
        ridge: The ridge as a share of the mean eigenvalue of A.
    """
    ridged = matrix + ridge * _scale(matrix) * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    solution: Tensor = torch.linalg.solve(ridged, missing, left=False)
    return solution


def _scale(matrix: Tensor) -> float:
    """Return the mean eigenvalue, which ridges are shares of."""
    return max(float(matrix.diagonal().mean()), torch.finfo(matrix.dtype).tiny)
