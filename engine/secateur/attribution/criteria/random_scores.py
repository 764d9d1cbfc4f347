"""Random scores: the baseline that every criterion must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from secateur.attribution.criteria.base import Criterion, FixedScores, Scorer, ScoringContext, require_seed


@dataclass(frozen=True)
class RandomScores(Criterion):
    """Scores drawn uniformly from 0 ... 1, without a pass over the model.

    Attributes:
        seed: The seed of the draws. A site's scores depend on the seed and on the site's name alone.

    Raises:
        InputError: The seed is not an integer of at least 0.

    Example:
        >>> scores = secateur.attribute(model, task, examples, criterion="random:seed=3")
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Check the seed."""
        require_seed(self.seed)

    def scorer(self, context: ScoringContext) -> Scorer:
        """Draw the scores."""
        generators = {site: np.random.default_rng((self.seed, *site.name.encode())) for site in context.sites}
        return FixedScores({site: torch.from_numpy(generator.random(site.units)) for site, generator in generators.items()})
