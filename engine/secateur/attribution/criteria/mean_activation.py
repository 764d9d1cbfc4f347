"""FPP: the mean size of a unit's activations."""

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

    The mean is over the real tokens of all examples and over the unit's channels. The activation is taken at the unit's gate:
    the input of the out-projection for a neuron or a head, and the V channel itself for a channel of V and O. The score of a
    Q/K channel is the sum of the means of Q and of K.

    Example:
        >>> scores = secateur.attribute(model, task, examples, criterion="fpp")

    Reference:
        Yang et al. 2023, arXiv 2205.04157 (a baseline).
    """

    def scorer(self, context: ScoringContext) -> Scorer:
        """Build a scorer that adds up absolute activations."""
        return TokenSums(context, scored_ports(context.model, context.sites), _mean)


def _mean(site: Site, moments: Sequence[tuple[Port, TokenMoments]]) -> Tensor:
    """Return the mean |activation| of each unit [B, units], summed over the site's ports."""
    # `fold` sums over a unit's channels, of which there are port.map.size / site.units.
    means = [port.map.fold(sums.absolute / sums.count) * site.units / port.map.size for port, sums in moments]
    return torch.stack(means).sum(0)  # [ports, B, units] -> [B, units]
