"""Least squares from sums over tokens: their moments, the ridge that fits other tokens best, and the step that it gives."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-9, 3))  # Of the mean eigenvalue of the matrix.
Equations = tuple[Tensor, Tensor]  # A [k, k] and B [m, k]: the steps X [m, k] that minimise tr(X A X^T) - 2 tr(X B^T).


class Moments:
    """Sums over tokens, float64: of inputs h [k] and wanted outputs y [d], of their products, and of |y|^2."""

    def __init__(self) -> None:
        self.tokens, self._sums = 0, list[Tensor]()

    def add(self, h: Tensor, y: Tensor) -> None:
        """h [n, k], y [n, d]."""
        h, y = h.double(), y.double()
        sums = [h.T @ h, y.T @ h, h.sum(0), y.sum(0), y.square().sum()]
        self._sums = [mine + other for mine, other in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.tokens += len(h)

    def plus(self, other: Moments) -> Moments:
        """Of all tokens of both."""
        found = Moments()
        found.tokens = self.tokens + other.tokens
        found._sums = [mine + theirs for mine, theirs in zip(self._sums, other._sums, strict=True)]
        return found

    @property
    def size(self) -> float:
        """sum |y|^2."""
        return float(self._sums[4])

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of h and of y."""
        return self._sums[2] / self.tokens, self._sums[3] / self.tokens

    def about(self, means: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """sum h h^T [k, k] and sum y h^T [d, k], of what h and y differ from the means by, if means are given."""
        inputs, crossed, h, y, _ = self._sums
        if means is None:
            return inputs, crossed
        of_h, of_y = means
        outer = torch.outer(of_h, h)
        inputs = inputs - outer - outer.T + self.tokens * torch.outer(of_h, of_h)
        crossed = crossed - torch.outer(of_y, h) - torch.outer(y, of_h) + self.tokens * torch.outer(of_y, of_h)
        return inputs, crossed

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """sum |y - W h - b|^2."""
        inputs, crossed, h, y, size = self._sums
        found = (weight @ inputs * weight).sum() - 2 * (weight * crossed).sum() + size
        if bias is not None:
            found += self.tokens * bias.square().sum() + 2 * (bias * (weight @ h - y)).sum()
        return max(0.0, float(found))  # Rounding can leave less than nothing.


def best_ridge(fitted: Equations, held_out: Equations) -> float | None:
    """The ridge with which the step fitted to some tokens has the least error on others; None where no step is better.

    In A's basis a ridge r turns B into the step B / (values + r), so all ridges' errors on the other tokens follow from one
    quadratic form in 1 / (values + r).
    """
    matrix, missing = fitted
    values, vectors = torch.linalg.eigh(matrix)
    missing, wanted = missing @ vectors, held_out[1] @ vectors
    curvature = (missing.T @ missing) * (vectors.T @ held_out[0] @ vectors)
    slope = (missing * wanted).sum(0)
    best, least = None, 0.0
    for ridge in RIDGES:
        steps = 1 / (values.clamp(min=0) + ridge * _scale(matrix))
        error = float(steps @ curvature @ steps - 2 * (slope @ steps))
        if error < 0 and error <= least:
            best, least = ridge, error
    return best


def step(matrix: Tensor, missing: Tensor, ridge: float) -> Tensor:
    """The X that minimises tr(X A X^T) - 2 tr(X B^T) + ridge |X|^2; directions that A does not see stay 0."""
    held = matrix + ridge * _scale(matrix) * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    found: Tensor = torch.linalg.solve(held, missing, left=False)
    return found


def _scale(matrix: Tensor) -> float:
    """The mean eigenvalue, which ridges are shares of."""
    return max(float(matrix.diagonal().mean()), torch.finfo(matrix.dtype).tiny)
