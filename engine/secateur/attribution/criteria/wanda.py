"""Wanda: weights times the norms of the activations that they read, in its structured form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.attribution.criteria.base import Criterion, Scorer, ScoringContext
from secateur.attribution.criteria.token_sums import TokenMoments, TokenSums, read_ports, read_weights
from secateur.model.branches import Port
from secateur.model.sites import Site


@dataclass(frozen=True)
class Wanda(Criterion):
    """|weight| x activation norm at the out-projection, by forward passes alone (Sun et al. 2024).

    The sum over a unit's channels of ||x_c||_2 * sum_j |W_jc|, norms over the real tokens of all examples (arXiv 2306.11695,
    Eq. 1, summed over the weights that go). No weight reads a Q/K channel: there the other side's norm stands for it,
    ||q_c||_2 * ||k_c||_2, which is the Frobenius norm of what the channel adds to the attention's logits. Norms of a unit are
    over all query heads of its group, and over both channels of a rotated pair, which rotating does not change.
    """

    def scorer(self, context: ScoringContext) -> Scorer:
        ports = read_ports(context.model, context.sites)
        weights = read_weights(context.model, ports, lambda weight: weight.abs().sum(0, dtype=torch.float64))

        def unit_scores(site: Site, seen: Sequence[tuple[Port, TokenMoments]]) -> Tensor:
            if site in weights:
                ((port, sums),) = seen
                return port.map.fold(sums.square.sqrt() * weights[site].to(sums.square))
            query, key = (port.map.fold(sums.square).sqrt() for port, sums in seen)
            return query * key

        return TokenSums(context, ports, unit_scores)
