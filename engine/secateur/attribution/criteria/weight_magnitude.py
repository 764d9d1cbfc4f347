"""Weight magnitude: the size of the weights that are removed with a unit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.attribution.criteria.base import Criterion, FixedScores, Scorer, ScoringContext
from secateur.model.branches import Port
from secateur.model.discovery import branches_of
from secateur.model.offloading import read_weight


@dataclass(frozen=True)
class WeightMagnitude(Criterion):
    """The sum of |w| over all weights that are removed with the unit, without a pass over the model.

    Biases do not count.

    Example:
        >>> scores = secateur.attribute(model, task, examples, criterion="magnitude")

    Reference:
        Li et al. 2017, arXiv 1608.08710, Sec. 3.1, which scores a filter like this.
    """

    def scorer(self, context: ScoringContext) -> Scorer:
        """Sum the weights of each unit."""
        branches = branches_of(context.model, context.sites).items()
        return FixedScores({site: _magnitudes(context.model, branch.cut_at(site.unit)) for site, branch in branches})


def _magnitudes(model: nn.Module, ports: Iterable[Port]) -> Tensor:
    """Return the sum of |w| of each unit over the ports, float64 [units]."""
    of_ports = []
    for port in ports:
        weight = read_weight(model.get_submodule(port.path))
        channel_sums = weight.abs().sum(1 if port.side == "output" else 0, dtype=torch.float64)  # [out, in] -> [channels]
        of_ports.append(port.map.fold(channel_sums))  # [units]
    return torch.stack(of_ports).sum(0)
