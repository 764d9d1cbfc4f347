"""Gradient x activation: the derivative of the target with respect to a gate on each unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from secateur.attribution.criteria.base import Scorer, ScoringContext, TargetCriterion
from secateur.attribution.fused_ffn import fused_feed_forwards
from secateur.attribution.gates import gate_gradients
from secateur.model.discovery import scored_ports
from secateur.model.sites import Site
from secateur.tasks import Batch
from secateur_kernels.backend import Backend


@dataclass(frozen=True)
class GradientActivation(TargetCriterion):
    """Gradient x activation, by one forward and one backward pass a batch.

    A_i = dF/dc_i at c = 1, the sum over tokens of h[t, i] * dF/dh[t, i] (Yang et al. 2023, arXiv 2205.04157, Eq. 4-5).
    """

    @classmethod
    def paper(cls) -> GradientActivation:
        """The setting of Yang et al. 2023: probabilities, signed sums over the examples (Eq. 6)."""
        return cls(target="probability", over_examples="signed")

    @classmethod
    def paper_unsupervised(cls) -> GradientActivation:
        """Their setting without labels: absolute values for all candidate labels, summed (Yang et al. 2023, Eq. 10)."""
        return cls(target="probability", over_examples="absolute", labels="all")

    @classmethod
    def fisher(cls) -> GradientActivation:
        """The squared gradient of the log-probability at the gates (Kwon et al. 2022, arXiv 2204.09656)."""
        return cls(target="log_probability", over_examples="squared")

    def scorer(self, context: ScoringContext) -> Scorer:
        def target(batch: Batch) -> Tensor:
            return context.task.target(context.model, batch, self.target)

        return OnePass(context.model, context.sites, target, backend=context.backend)


class OnePass(Scorer):
    """Scores units by the gradients of F at their gates, with one forward and one backward pass a batch.

    Args:
        model: The model. Its parameters must be frozen (`undisturbed`).
        sites: The sites to score.
        target: Runs the model on a batch and returns F [B].
        backend: Of the kernels.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], target: Callable[[Batch], Tensor], *, backend: Backend = "auto"
    ) -> None:
        self._model, self._target, self._backend = model, target, backend
        self._ports, self._fused = scored_ports(model, sites), fused_feed_forwards(model, sites, backend)

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        target = partial(self._target, batch)
        return gate_gradients(self._model, self._ports, target, fused=self._fused, backend=self._backend)[1]
