"""Masks as torch parametrizations of linear layers' weights: of single elements, and of the ranks of a factorised weight."""

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
    """values * mask, with the gradient to the scores that the mask came from as if the mask were the scores themselves."""

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
    """Which entries of a weight [m, n] stay.

    method "magnitude": importance is the entry's absolute value. "movement": it is a score of its own, which learns from
    the straight-through gradient dL/d(entry * mask) * entry (Sanh et al. 2020, arXiv 2005.07683, equation 4).
    `mask` [entries] (bool) is None while all stay. It is no part of the state: importance and step decide it.
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
        """m * n."""
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """How many entries stay."""
        return self.entries if self.mask is None else int(torch.count_nonzero(self.mask))

    @abstractmethod
    def stored(self, kept: int) -> int:
        """How many weights a checkpoint holds of which so many entries stay."""

    @abstractmethod
    def values(self, *originals: Tensor) -> Tensor:
        """The entries, out of what the parametrization keeps of the weight."""

    def importance(self, *originals: Tensor) -> Tensor:
        """[entries], detached: what the mask is chosen by."""
        found = self.values(*originals).abs() if self.scores is None else self.scores
        return found.detach().flatten()

    def keep_(self, chosen: Tensor | None) -> None:
        """Sets the mask, bool [entries]; None: all stay."""
        self.mask = None if chosen is None or bool(chosen.all()) else chosen

    def masked(self, values: Tensor) -> Tensor:
        if self.scores is not None:
            result: Tensor = _StraightThrough.apply(values, self.scores, _shaped(self.mask, values))  # type: ignore[no-untyped-call]
            return result
        mask = _shaped(self.mask, values)
        return values if mask is None else values * mask


class ElementMask(Mask):
    """Single elements stay or go: W * M."""

    def __init__(self, weight: Tensor, method: Method) -> None:
        rows, columns = weight.shape
        super().__init__((rows, columns), (rows, columns), method, weight)

    def stored(self, kept: int) -> int:
        return kept

    def values(self, *originals: Tensor) -> Tensor:
        (weight,) = originals
        return weight

    def forward(self, weight: Tensor) -> Tensor:
        return self.masked(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class RankMask(Mask):
    """Ranks stay or go: U (s * M) V of a singular value decomposition, whose factors then learn without any constraint
    (Xia and Shin 2021, arXiv 2112.05705)."""

    def __init__(self, weight: Tensor, method: Method) -> None:
        rows, columns = weight.shape
        super().__init__((rows, columns), (min(rows, columns),), method, weight)

    def stored(self, kept: int) -> int:
        """kept * (m + n): the values lie within the factors. A product that holds less is stored instead."""
        return min(kept * sum(self.shape), self.weights)

    def values(self, *originals: Tensor) -> Tensor:
        return originals[1]

    def forward(self, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
        return (left * self.masked(values)) @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        return left.to(weight.dtype).contiguous(), values.to(weight.dtype), right.to(weight.dtype).contiguous()


def _shaped(mask: Tensor | None, values: Tensor) -> Tensor | None:
    return None if mask is None else mask.view_as(values)


MASKS: dict[Granularity, type[ElementMask] | type[RankMask]] = {"element": ElementMask, "rank": RankMask}
