"""Gradient x activation: the derivative of the target with respect to a gate on each unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.criteria.base import Criterion, Scorer
from secateur.discovery import scored_ports
from secateur.fused import fused_feed_forwards
from secateur.gates import gate_gradients
from secateur.site import Site
from secateur.tasks import Batch, Target, Task


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

    def scorer(self, model: nn.Module, task: Task, sites: Sequence[Site], max_tokens: int) -> Scorer:
        return _OnePass(model, task, sites, self.target)


class _OnePass(Scorer):
    def __init__(self, model: nn.Module, task: Task, sites: Sequence[Site], target: Target) -> None:
        self._model, self._task, self._target = model, task, target
        self._ports, self._fused = scored_ports(model, sites), fused_feed_forwards(model, sites)

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        def target() -> Tensor:
            return self._task.target(self._model, batch, self._target)

        return gate_gradients(self._model, self._ports, target, fused=self._fused)[1]
