"""Random scores: what a criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from secateur.attribution.criteria.base import Criterion, FixedScores, Scorer, ScoringContext, require_seed


@dataclass(frozen=True)
class RandomScores(Criterion):
    """Scores drawn uniformly from 0 ... 1, without a pass over the model.

    seed: a site's scores depend on it and on the site's name.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        require_seed(self.seed)

    def scorer(self, context: ScoringContext) -> Scorer:
        generators = {site: np.random.default_rng((self.seed, *site.name.encode())) for site in context.sites}
        return FixedScores({site: torch.from_numpy(draw.random(site.units)) for site, draw in generators.items()})
