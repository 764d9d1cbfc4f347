"""FPP: how large a unit's activations are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.attribution.criteria.base import Criterion, Scorer, ScoringContext
from secateur.attribution.criteria.token_sums import TokenMoments, TokenSums
from secateur.model.branches import Port
from secateur.model.discovery import scored_ports
from secateur.model.sites import Site


@dataclass(frozen=True)
class MeanActivation(Criterion):
    """The mean |activation| over tokens, by forward passes alone (Yang et al. 2023, FPP).

    Over real tokens and the unit's channels, where its gate is (arXiv 2205.04157, a baseline): the input of the out-projection
    for a neuron or a head, the V channel, the sum of both sides' means for a Q/K channel.
    """

    def scorer(self, context: ScoringContext) -> Scorer:
        return TokenSums(context, scored_ports(context.model, context.sites), _mean)


def _mean(site: Site, seen: Sequence[tuple[Port, TokenMoments]]) -> Tensor:
    means = [port.map.fold(sums.absolute / sums.count) * site.units / port.map.size for port, sums in seen]
    return torch.stack(means).sum(0)
