"""Gradient x activation: the derivative of the target with respect to a gate on each unit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.criteria.base import Criterion
from secateur_kernels import product_sum


@dataclass(frozen=True)
class GradientActivation(Criterion):
    """A_i = dF/dc_i at c = 1, the sum over tokens of h[t, i] * dF/dh[t, i] (Yang et al. 2023, arXiv 2205.04157, Eq. 4-5)."""

    @classmethod
    def paper(cls) -> GradientActivation:
        """The paper's setting: probabilities, signed sums over the examples (Eq. 6)."""
        return cls(target="probability", over_examples="signed")

    @classmethod
    def paper_unsupervised(cls) -> GradientActivation:
        """The paper's setting without labels: the absolute values for all candidate labels, summed (Eq. 10)."""
        return cls(target="probability", over_examples="absolute", labels="all")

    def token_sum(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return product_sum(activation, gradient)
