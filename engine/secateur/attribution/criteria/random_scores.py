"""Random scores: what a criterion must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from secateur.attribution.criteria.base import Criterion, FixedScores, Scorer, require_seed
from secateur.model.sites import Site
from secateur.tasks import Task


@dataclass(frozen=True)
class RandomScores(Criterion):
    """Scores drawn uniformly from 0 ... 1, without a pass over the model.

    seed: a site's scores depend on it and on the site's name.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        require_seed(self.seed)

    def scorer(self, model: nn.Module, task: Task, sites: Sequence[Site], max_tokens: int) -> Scorer:
        generators = {site: np.random.default_rng((self.seed, *site.name.encode())) for site in sites}
        return FixedScores({site: torch.from_numpy(draw.random(site.units)) for site, draw in generators.items()})
