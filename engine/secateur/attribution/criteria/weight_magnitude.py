"""Weight magnitude: how large the weights are that go with a unit."""

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
    """The sum of |w| over all weights that go with the unit, without a pass over the model.

    As for a filter in Li et al. 2017 (arXiv 1608.08710, Sec. 3.1); biases don't count.
    """

    def scorer(self, context: ScoringContext) -> Scorer:
        branches = branches_of(context.model, context.sites).items()
        return FixedScores({site: _magnitudes(context.model, branch.cut_at(site.unit)) for site, branch in branches})


def _magnitudes(model: nn.Module, ports: Iterable[Port]) -> Tensor:
    """Float64 [units]."""
    terms = []
    for port in ports:
        weight = read_weight(model.get_submodule(port.path))
        terms.append(port.map.fold(weight.abs().sum(1 if port.side == "output" else 0, dtype=torch.float64)))
    return torch.stack(terms).sum(0)
