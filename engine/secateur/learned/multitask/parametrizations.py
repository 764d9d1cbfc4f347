"""Masks as torch parametrizations of linear weights: over single elements, or over the ranks of a factorised weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Method = Literal["magnitude", "movement"]
Granularity = Literal["element", "rank"]


class _StraightThrough(torch.autograd.Function):
    """Compute values * mask; the gradient passes to the scores as if the mask were the scores (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, mask)
        return values.view_as(values) if mask is None else values * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        values, mask = ctx.saved_tensors
        return (gradient if mask is None else gradient * mask), gradient * values, None


class Mask(nn.Module, ABC):
    """A mask over the entries of a weight [m, n], as a torch parametrization.

    Args:
        shape: The weight's shape (m, n).
        entries: The shape of the entries: (m, n) for elements, (min(m, n),) for ranks.
        method: How important an entry is. "magnitude" takes its absolute value. "movement" takes a score, which is trained with
            the straight-through gradient dL/d(entry * mask) * entry.
        like: A tensor whose device and dtype the scores get.

    Attributes:
        mask: bool [entries], True where an entry stays; None while all entries stay. It is not in the state dict, because the
            importance and the training step determine it.
        scores: The trained scores, of the shape of the entries, or None for "magnitude".

    References:
        Sanh et al. 2020, arXiv 2005.07683, equation 4 (the scores' gradient).
    """

    mask: Tensor | None

    def __init__(self, shape: tuple[int, int], entries: tuple[int, ...], method: Method, like: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.entries = math.prod(entries)
        self.register_buffer("mask", None, persistent=False)
        self.scores = nn.Parameter(torch.zeros(entries, dtype=like.dtype, device=like.device)) if method == "movement" else None

    @property
    def weights(self) -> int:
        """The number of elements of the weight, m * n."""
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """The number of entries that stay."""
        return self.entries if self.mask is None else int(torch.count_nonzero(self.mask))

    @abstractmethod
    def stored(self, kept: int) -> int:
        """Count the weights that a checkpoint stores if `kept` entries stay."""

    @abstractmethod
    def values(self, *originals: Tensor) -> Tensor:
        """Return the entries.

        Args:
            originals: The tensors that the parametrization stores: the weight [m, n], or the factors U, s and V.

        Returns:
            The weight [m, n], or the singular values [ranks].
        """

    def importance(self, *originals: Tensor) -> Tensor:
        """Return the importance of the entries, detached, floating point [entries]. Arguments are as in `values`."""
        importance = self.values(*originals).abs() if self.scores is None else self.scores
        return importance.detach().flatten()

    def keep_(self, chosen: Tensor | None) -> None:
        """Set the mask.

        Args:
            chosen: bool [entries], True where an entry stays, or None to keep all entries.
        """
        self.mask = None if chosen is None or bool(chosen.all()) else chosen

    def masked(self, values: Tensor) -> Tensor:
        """Multiply the entries by the mask; with "movement", the gradient also reaches the scores."""
        mask = None if self.mask is None else self.mask.view_as(values)
        if self.scores is not None:
            result: Tensor = _StraightThrough.apply(values, self.scores, mask)  # type: ignore[no-untyped-call]
            return result
        return values if mask is None else values * mask


class ElementMask(Mask):
    """A mask M over single elements of a weight: W * M.

    Args:
        weight: The weight [m, n].
        method: "magnitude" or "movement".
    """

    def __init__(self, weight: Tensor, method: Method) -> None:
        rows, columns = weight.shape
        super().__init__((rows, columns), (rows, columns), method, weight)

    def stored(self, kept: int) -> int:
        """Count `kept` weights."""
        return kept

    def values(self, *originals: Tensor) -> Tensor:
        """Return the weight [m, n]."""
        (weight,) = originals
        return weight

    def forward(self, weight: Tensor) -> Tensor:
        """Compute the masked weight [m, n]."""
        return self.masked(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the tensor to store for a weight, which is the weight itself."""
        return weight


class RankMask(Mask):
    """A mask M over the ranks of a weight's singular value decomposition: U (s * M) V.

    The factors are trained without any constraint.

    Args:
        weight: The weight [m, n].
        method: "magnitude" or "movement".

    References:
        Xia and Shin 2021, arXiv 2112.05705.
    """

    def __init__(self, weight: Tensor, method: Method) -> None:
        rows, columns = weight.shape
        super().__init__((rows, columns), (min(rows, columns),), method, weight)

    def stored(self, kept: int) -> int:
        """Count kept * (m + n) weights, as the factors hold the singular values; m * n if the product holds fewer."""
        return min(kept * sum(self.shape), self.weights)

    def values(self, *originals: Tensor) -> Tensor:
        """Return the singular values [ranks]."""
        return originals[1]

    def forward(self, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
        """Compute the masked weight [m, n] from U [m, ranks], s [ranks] and V [ranks, n]."""
        return (left * self.masked(values)) @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factorise a weight in float32; return U, s and V in the weight's dtype."""
        left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        return left.to(weight.dtype).contiguous(), values.to(weight.dtype), right.to(weight.dtype).contiguous()


MASKS: dict[Granularity, type[ElementMask] | type[RankMask]] = {"element": ElementMask, "rank": RankMask}
