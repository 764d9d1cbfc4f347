"""RAP: gradient x activation towards random wrong word-pieces, as a check that the right ones matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.attribution.criteria.base import OverExamples, Scorer, ScoringContext, TargetCriterion, require_seed
from secateur.attribution.criteria.gradient_activation import OnePass
from secateur.tasks import Batch, Target
from secateur.tasks.base import target_of
from secateur.tasks.batches import IGNORED


@dataclass(frozen=True)
class RandomTargets(TargetCriterion):
    """Gradient x activation towards random wrong word-pieces (Yang et al. 2023, RAP).

    At each target position F is that of a piece drawn uniformly from all but the label, while the decoder is fed with the
    label as ever (arXiv 2205.04157, a baseline; probabilities and signed sums as in its Eq. 6). seed: a draw depends on it,
    the example's row and the position.
    """

    target: Target = "probability"
    over_examples: OverExamples = "signed"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seed(self.seed)

    def scorer(self, context: ScoringContext) -> Scorer:
        def target(batch: Batch) -> Tensor:
            logits = context.task.logits(context.model, batch)
            return target_of(logits, wrong_labels(batch, logits.shape[-1], self.seed), self.target)

        return OnePass(context.model, context.sites, target, backend=context.backend)


def wrong_labels(batch: Batch, classes: int, seed: int) -> Tensor:
    """In place of each label [B, T] another class."""
    found = batch.labels.to("cpu", copy=True)
    for labels, row in zip(found, batch.rows, strict=True):
        real = labels != IGNORED
        drawn = torch.from_numpy(np.random.default_rng((seed, row)).integers(classes - 1, size=int(real.sum())))
        labels[real] = drawn + (drawn >= labels[real])
    return found.to(batch.labels.device)
