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

    A gate c_i multiplies the activation h[t, i] of unit i at every token t. The score of the unit for one example is the
    derivative of the target F with respect to the gate, at c = 1:

        A_i = dF/dc_i = sum over tokens t of h[t, i] * dF/dh[t, i]

    The scores of the examples are then added up as `over_examples` says.

    Attributes:
        target: The target F, summed over the pieces of an example's target: "probability", "log_probability" (the default) or
            "margin".
        over_examples: How the examples' scores add up: "signed" as they are, "absolute" as absolute values (the default), or
            "squared" (the empirical Fisher information of the unit's gate).
        labels: "given" uses each example's own target (the default). "all" uses all candidate labels in turn, so that examples
            need no labels.

    Raises:
        InputError: A setting has none of these values.

    Example:
        >>> criterion = secateur.GradientActivation(target="log_probability", over_examples="absolute")
        >>> scores = secateur.attribute(model, task, examples, criterion=criterion)
        >>> scores = secateur.attribute(model, task, examples, criterion="gradient")  # The same, by name.

    Reference:
        Yang et al. 2023, arXiv 2205.04157, Eq. 4-5. The paper's own settings are `paper` and `paper_unsupervised`.
    """

    @classmethod
    def paper(cls) -> GradientActivation:
        """Gradient x activation as in Yang et al. 2023: probabilities, signed sums over the examples (Eq. 6).

        Returns:
            The criterion.

        Reference:
            Yang et al. 2023, arXiv 2205.04157, Eq. 6.
        """
        return cls(target="probability", over_examples="signed")

    @classmethod
    def paper_unsupervised(cls) -> GradientActivation:
        """Gradient x activation without labels: absolute values, summed over all candidate labels (Yang et al. 2023, Eq. 10).

        Returns:
            The criterion.

        Reference:
            Yang et al. 2023, arXiv 2205.04157, Eq. 10.
        """
        return cls(target="probability", over_examples="absolute", labels="all")

    @classmethod
    def fisher(cls) -> GradientActivation:
        """The squared gradient of the log-probability at the gates (Kwon et al. 2022, arXiv 2204.09656).

        Returns:
            The criterion.

        Reference:
            Kwon et al. 2022, arXiv 2204.09656.
        """
        return cls(target="log_probability", over_examples="squared")

    def scorer(self, context: ScoringContext) -> Scorer:
        """Build a scorer that takes one forward and one backward pass a batch."""

        def target(batch: Batch) -> Tensor:
            return context.task.target(context.model, batch, self.target)

        return OnePass(context.model, context.sites, target, backend=context.backend)


class OnePass(Scorer):
    """A scorer by the gradients of F with respect to the gates, with one forward and one backward pass a batch.

    Args:
        model: The model. Its parameters must be frozen (`undisturbed`).
        sites: The sites to score.
        target: A function that runs the model on a batch and returns F [B].
        backend: The implementation of the kernels.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], target: Callable[[Batch], Tensor], *, backend: Backend = "auto"
    ) -> None:
        self._model, self._target, self._backend = model, target, backend
        self._ports, self._fused = scored_ports(model, sites), fused_feed_forwards(model, sites, backend)

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        """Return dF/dc of each unit for each example, [B, units] by site."""
        target = partial(self._target, batch)
        return gate_gradients(self._model, self._ports, target, fused=self._fused, backend=self._backend)[1]
