"""Least squares from sums over tokens: moments, the ridge with the least error on held-out tokens, and the step it gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-9, 3))  # As shares of the mean eigenvalue of the matrix.
_FIRST = (3, 6, 8, 10)  # The numbers of the ridges that the search begins with. The best ones of most layers are near them.
# From this ridge on float32 is enough for a trial. It rounds by 6e-8 of the largest eigenvalue, which may be some hundred times
# the mean.
_NARROW = RIDGES[5]
SMALL = 256  # Smaller matrices take less time for one eigenvalue decomposition than for several Cholesky factorisations.
_COLUMNS = 512  # Columns of a symmetric product that are computed at once. The part above the diagonal is mirrored.
# A [k, k] and B [m, k] of the problem whose steps X [m, k] minimise tr(X A X^T) - 2 tr(X B^T).
Equations = tuple[Tensor, Tensor]
Folds = Iterable[tuple[Equations, Equations]]


class Moments:
    """Float64 sums over tokens: of inputs h [k] and target outputs y [d], of their products, and of |y|^2.

    They take 8 * (k^2 + d k + k + d + 1) bytes. Adding n tokens takes about n k^2 + 2 n k d floating-point
    operations.
    """

    def __init__(self) -> None:
        self.tokens, self._sums = 0, list[Tensor]()

    def add(self, h: Tensor, y: Tensor) -> None:
        """Add n tokens: inputs h [n, k] and target outputs y [n, d]."""
        h, y = double(h), double(y)
        k, d = h.shape[1], y.shape[1]
        if not self._sums:
            self._sums = [h.new_zeros(shape) for shape in ((k, k), (d, k), (k,), (d,), ())]
        inputs, crossed, of_h, of_y, size = self._sums
        for start in range(0, k, _COLUMNS):
            block = slice(start, start + _COLUMNS)
            inputs[block, : block.stop].addmm_(h[:, block].T, h[:, : block.stop])
            inputs[:start, block] = inputs[block, :start].T
        crossed.addmm_(y.T, h)
        of_h += h.sum(0)
        of_y += y.sum(0)
        size += y.square().sum()
        self.tokens += len(h)

    def plus(self, other: Moments) -> Moments:
        """Return the moments of the tokens of both."""
        return _moments(self.tokens + other.tokens, [a + b for a, b in zip(self._sums, other._sums, strict=True)])

    def without(self, weight: Tensor, bias: Tensor | None) -> Moments:
        """Return the moments of the same inputs with the outputs y - W h - b, for a weight W [d, k] and a bias b [d].

        The sums of the inputs are shared, not copied.
        """
        inputs, crossed, h, y, size = self._sums
        left, missing = crossed - weight @ inputs, y - weight @ h
        size = size - (weight * (crossed + left)).sum()
        if bias is not None:
            size = size - (2 * missing - self.tokens * bias) @ bias
            left, missing = left - torch.outer(bias, h), missing - self.tokens * bias
        return _moments(self.tokens, [inputs, left, h, missing, size.clamp(min=0)])  # Rounding can make it negative.

    def mixed(self, mixture: Tensor) -> Moments:
        """Return the moments of the same inputs with the outputs S y, for a mixture S [m, d]. Its size is not known, and 0."""
        inputs, crossed, h, y, size = self._sums
        return _moments(self.tokens, [inputs, mixture @ crossed, h, mixture @ y, torch.zeros_like(size)])

    @property
    def size(self) -> float:
        """The sum of |y|^2."""
        return float(self._sums[4])

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The means of h [k] and of y [d]."""
        return self._sums[2] / self.tokens, self._sums[3] / self.tokens

    def about(self, means: tuple[Tensor, Tensor] | None) -> Equations:
        """Return sum h h^T [k, k] and sum y h^T [d, k], of differences from the means if means are given."""
        inputs, crossed, h, y, _ = self._sums
        if means is None:
            return inputs, crossed
        of_h, of_y = means
        outer = torch.outer(of_h, h)
        inputs = inputs - outer - outer.T + self.tokens * torch.outer(of_h, of_h)
        crossed = crossed - torch.outer(of_y, h) - torch.outer(y, of_h) + self.tokens * torch.outer(of_y, of_h)
        return inputs, crossed

    def error(self, weight: Tensor | None, bias: Tensor | None) -> float:
        """Return sum |y - W h - b|^2 for a weight W [d, k] and a bias b [d]. None stands for zeros."""
        inputs, crossed, h, y, size = self._sums
        error = size.clone()
        if weight is not None:
            error += _changes((inputs, crossed), weight).sum()
        if bias is not None:
            error += self.tokens * bias.square().sum() - 2 * (bias @ y)
        if weight is not None and bias is not None:
            error += 2 * (bias @ (weight @ h))
        return max(0.0, float(error))  # Rounding can make it negative.


def double(values: Tensor) -> Tensor:
    """Return the values in float64, on the CPU where their device has no float64 (MPS)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def in_their_span(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis [k, n] of a space that holds n <= k tokens h [n, k], and their coordinates [n, n] in it.

    Least squares with a ridge has its step in this space. So problems with fewer tokens than inputs shrink to n inputs, without
    any loss. It takes about 4 n^2 k floating-point operations.
    """
    basis, triangle = torch.linalg.qr(double(h).T)  # [k, n], [n, n]
    return basis, triangle.T


def mixture_of(outputs: int, mixed: int) -> Tensor:
    """Return random numbers S [mixed, outputs] with a fixed seed for which the expectation of S^T S is the identity.

    So sums of squares of S y are on average those of y, and far fewer outputs can take part in a search.
    """
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(mixed, outputs, generator=generator, dtype=torch.float64)
    return torch.as_tensor(numbers / mixed**0.5)


def best_ridge(folds: Folds, width: int | None = None) -> tuple[float | None, Tensor]:
    """Return the ridge whose steps, each fitted to some tokens, have the least error on the tokens held out from them.

    The search begins with the ridges 1e-6, .001, .1 and 10. The neighbours of the best one are tried until none is better. A
    trial is a Cholesky factorisation for each fold, k^3 / 3 floating-point operations, and products with the outputs, 4 m k^2.
    The steps of ridges from 1e-4 on are float32. Where k is less than `SMALL`, an eigenvalue decomposition for each fold gives
    the errors of all ridges.

    Args:
        folds: For each fold the equations of the fitted tokens, and those of the held-out tokens. They are iterated several
            times.
        width: As in `step`.

    Returns:
        The ridge as a share of the mean eigenvalue, and by how much each output's error is larger than that of no step, summed
            over the folds [m]; of a small matrix the sum over the outputs alone [1]. The sum is negative; the ridge is None
            where no ridge makes it so.
    """
    small = all(len(matrix) < SMALL for (matrix, _), _ in islice(folds, 1))
    changes = dict(enumerate(_changes_of_all(folds, width))) if small else dict[int, Tensor]()
    tried: Sequence[int] = () if small else _FIRST
    while tried:
        changes |= zip(tried, changes_of(folds, [RIDGES[number] for number in tried], width), strict=True)
        best = _least(changes)
        tried = [number for number in (best - 1, best + 1) if 0 <= number < len(RIDGES) and number not in changes]
    best = _least(changes)
    return RIDGES[best] if float(changes[best].sum()) < 0 else None, changes[best]


def changes_of(folds: Folds, ridges: Sequence[float], width: int | None = None, *, narrow: bool = True) -> list[Tensor]:
    """Return for each ridge the change of each output's held-out error, summed over the folds [m]. Args as in `best_ridge`.

    `narrow` allows float32 for the steps.
    """
    changes = dict[float, Tensor]()
    for fitted, held_out in folds:
        # The same problem with a mean eigenvalue of 1, which float32 has the range for.
        few_bits = [(of_fitted / _scale(fitted[0], width)).float() for of_fitted in fitted] if narrow else []
        for ridge in ridges:
            taken = _solution(few_bits[0], few_bits[1], ridge) if few_bits and ridge >= _NARROW else None
            if taken is None:  # Also where float32 is too narrow.
                taken = step(*fitted, ridge, width)
            change = _changes(held_out, taken.double())
            changes[ridge] = changes[ridge] + change if ridge in changes else change
    return [changes[ridge] if changes else torch.zeros(1, dtype=torch.float64) for ridge in ridges]


def step(matrix: Tensor, missing: Tensor, ridge: float, width: int | None = None) -> Tensor:
    """Return the step X [m, k] that minimises tr(X A X^T) - 2 tr(X B^T) + ridge |X|^2.

    Directions in the null space of A stay 0.

    Args:
        matrix: A [k, k].
        missing: B [m, k].
        ridge: The ridge as a share of the mean eigenvalue of A.
        width: The number of eigenvalues of which the mean is taken, where A is a larger matrix without its null space; k if
            None.
    """
    added = ridge * _scale(matrix, width)
    taken = _solution(matrix, missing, added)
    if taken is not None:
        return taken
    # Rounding has made the smallest eigenvalues negative by more than the ridge, or all of A is 0.
    values, vectors = torch.linalg.eigh(matrix)  # [k], [k, k]
    above = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    inverse = torch.where(above, 1 / (values + added), torch.zeros_like(values))  # [k]
    of_positive_part: Tensor = (missing @ vectors * inverse) @ vectors.T
    return of_positive_part


def _solution(matrix: Tensor, missing: Tensor, added: float) -> Tensor | None:
    """Return B (A + a)^-1 for B [m, k], A [k, k] and a number a, or None where A + a is not positive definite."""
    ridged = matrix.clone()
    ridged.diagonal().add_(added)
    factor, failed = torch.linalg.cholesky_ex(ridged)
    return None if failed else torch.as_tensor(torch.cholesky_solve(missing.T, factor).T)


def _least(changes: Mapping[int, Tensor]) -> int:
    """Return the key of the least sum. Of equals, it is the largest key: the ridge that moves least."""
    return min(sorted(changes, reverse=True), key=lambda number: float(changes[number].sum()))


def _changes_of_all(folds: Folds, width: int | None) -> list[Tensor]:
    """Return for each of `RIDGES` the change of the held-out error, summed over the outputs and the folds [1].

    In the eigenbasis of A a ridge r turns B into the step B / (values + r). So the errors of all ridges on the held-out tokens
    follow from one quadratic form in 1 / (values + r).
    """
    changes = [torch.zeros(1, dtype=torch.float64) for _ in RIDGES]
    for (matrix, missing), (of_held_out, target) in folds:
        values, vectors = torch.linalg.eigh(matrix)  # [k], [k, k]
        missing, target = missing @ vectors, target @ vectors  # [m, k] each
        curvature = (missing.T @ missing) * (vectors.T @ of_held_out @ vectors)  # [k, k]
        slope = (missing * target).sum(0)  # [k]
        added = torch.tensor(RIDGES, dtype=values.dtype, device=values.device) * _scale(matrix, width)
        steps = 1 / (values.clamp(min=0) + added.unsqueeze(1))  # [ridges, k]
        errors = ((steps @ curvature) * steps).sum(1) - 2 * (steps @ slope)  # [ridges]
        changes = [change + error for change, error in zip(changes, errors.cpu(), strict=True)]
    return changes


def _changes(equations: Equations, taken: Tensor) -> Tensor:
    """Return for each row of a step X [m, k] its part of tr(X A X^T) - 2 tr(X B^T), [m]."""
    matrix, missing = equations
    return (taken @ matrix * taken).sum(1) - 2 * (taken * missing).sum(1)


def _moments(tokens: int, sums: list[Tensor]) -> Moments:
    """Return the moments with these sums."""
    moments = Moments()
    moments.tokens, moments._sums = tokens, sums
    return moments


def _scale(matrix: Tensor, width: int | None) -> float:
    """Return the mean eigenvalue, which ridges are shares of."""
    return max(float(matrix.diagonal().sum()) / max(width or len(matrix), 1), torch.finfo(matrix.dtype).tiny)
