"""FLAP: how much a unit's contribution to the output of the out-projection fluctuates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur.attribution.criteria.base import Criterion, Scorer, ScoringContext
from secateur.attribution.criteria.token_sums import TokenMoments, TokenSums, read_ports, read_weights
from secateur.model.branches import Port
from secateur.model.sites import Site


@dataclass(frozen=True)
class Fluctuation(Criterion):
    """Variance of the activation x squared weight norm, by forward passes alone (FLAP, An et al. 2024).

    The score of a unit is the sum over its channels c of var(x_c) * ||W_:,c||_2^2. Here x_c is the input of the out-projection,
    W is the weight of the out-projection, and the sample variance is over the real tokens of all examples.

    A Q/K channel is no input of a weight. There the mean square of the other side takes the place of the squared weight norm:
    var(q_c) * mean(k_c^2) + var(k_c) * mean(q_c^2). This measures the change of the attention's logits if one side is replaced
    by its mean. The variances and mean squares of a unit are summed over the query heads of its group and over a rotated pair.

    Example:
        >>> scores = secateur.attribute(model, task, examples, criterion="flap")

    Reference:
        An et al. 2024, arXiv 2312.11983 (weighted input feature variance).
    """

    def scorer(self, context: ScoringContext) -> Scorer:
        """Build a scorer that adds up moments of activations and reads the squared weight norms once."""
        ports = read_ports(context.model, context.sites)
        # Squared norms [channels] of the columns of each weight [out, channels].
        squared_norms = read_weights(context.model, ports, lambda weight: weight.double().square().sum(0))

        def unit_scores(site: Site, moments: Sequence[tuple[Port, TokenMoments]]) -> Tensor:
            if site in squared_norms:
                ((port, sums),) = moments
                return port.map.fold(sums.variance() * squared_norms[site].to(sums.plain))  # [B, channels] -> [B, units]
            variances = [port.map.fold(sums.variance()) for port, sums in moments]  # Q and K: [B, units]
            mean_squares = [port.map.fold(sums.square / sums.count) for port, sums in moments]
            return variances[0] * mean_squares[1] + variances[1] * mean_squares[0]

        return TokenSums(context, ports, unit_scores)
