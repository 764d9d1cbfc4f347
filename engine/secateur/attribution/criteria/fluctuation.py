"""FLAP: how much what the out-projection makes of a unit fluctuates."""

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

    The sum over a unit's channels of the sample variance of x_c over the real tokens of all examples * ||W_:,c||_2^2 (arXiv
    2312.11983, weighted input feature variance). No weight reads a Q/K channel: there the other side's mean square stands for
    its squared norm, var(q_c) * mean(k_c^2) + var(k_c) * mean(q_c^2), what the attention's logits lose where either side is
    put to its mean. Variances and mean squares of a unit are summed over the query heads of its group and a rotated pair.
    """

    def scorer(self, context: ScoringContext) -> Scorer:
        ports = read_ports(context.model, context.sites)
        weights = read_weights(context.model, ports, lambda weight: weight.double().square().sum(0))

        def unit_scores(site: Site, seen: Sequence[tuple[Port, TokenMoments]]) -> Tensor:
            if site in weights:
                ((port, sums),) = seen
                return port.map.fold(sums.variance() * weights[site].to(sums.plain))
            varied = [port.map.fold(sums.variance()) for port, sums in seen]
            squared = [port.map.fold(sums.square / sums.count) for port, sums in seen]
            return varied[0] * squared[1] + varied[1] * squared[0]

        return TokenSums(context, ports, unit_scores)
