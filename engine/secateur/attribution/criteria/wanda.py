"""Wanda: weights times the norms of their input activations, summed over a unit."""

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

    The score of a unit is the sum over its channels c of ||x_c||_2 * sum_j |W_jc|. Here x_c is the input of the out-projection
    and W is its weight. The norms are over the real tokens of all examples.

    A Q/K channel is no input of a weight. There the norm of the other side takes the place of the weights:
    ||q_c||_2 * ||k_c||_2. This is the Frobenius norm of the channel's contribution to the attention's logits. The norms of a
    unit are over all query heads of its group, and over both channels of a rotated pair. The rotation does not change them.

    Example:
        >>> scores = secateur.attribute(model, task, examples, criterion="wanda")

    Reference:
        Sun et al. 2024, arXiv 2306.11695, Eq. 1, summed over the weights that are removed with the unit.
    """

    def scorer(self, context: ScoringContext) -> Scorer:
        """Build a scorer that adds up squared activations and reads the sums of absolute weights once."""
        ports = read_ports(context.model, context.sites)
        # Sums [channels] of the columns of each weight [out, channels].
        absolute_sums = read_weights(context.model, ports, lambda weight: weight.abs().sum(0, dtype=torch.float64))

        def unit_scores(site: Site, moments: Sequence[tuple[Port, TokenMoments]]) -> Tensor:
            if site in absolute_sums:
                ((port, sums),) = moments
                return port.map.fold(sums.square.sqrt() * absolute_sums[site].to(sums.square))  # [B, channels] -> [B, units]
            query_norms, key_norms = (port.map.fold(sums.square).sqrt() for port, sums in moments)  # [B, units]
            return query_norms * key_norms

        return TokenSums(context, ports, unit_scores)
