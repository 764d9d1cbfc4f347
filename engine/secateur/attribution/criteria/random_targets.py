"""RAP: gradient x activation towards random wrong word-pieces, a check that the right word-pieces matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.attribution.criteria.base import OverExamples, Scorer, ScoringContext, TargetCriterion, require_seed
from secateur.attribution.criteria.gradient_activation import OnePass
from secateur.support.errors import InputError
from secateur.tasks import Batch, Target
from secateur.tasks.base import target_of
from secateur.tasks.batches import IGNORED


@dataclass(frozen=True)
class RandomTargets(TargetCriterion):
    """Gradient x activation towards random wrong word-pieces (Yang et al. 2023, RAP).

    At each target position, F is taken for a word-piece that is drawn uniformly from all pieces but the label. The input of the
    decoder does not change: it is still made from the label. By default, F is the probability and sums are signed, as in the
    paper's Eq. 6.

    Attributes:
        target: The target F, as in `GradientActivation`.
        over_examples: How the examples' scores add up, as in `GradientActivation`.
        labels: Each example's own target or all candidate labels, as in `GradientActivation`.
        seed: The seed of the draws. A draw depends on the seed, the example's row and the position.

    Raises:
        InputError: A setting is out of range.

    Example:
        >>> scores = secateur.attribute(model, task, examples, criterion="rap:seed=3")

    Reference:
        Yang et al. 2023, arXiv 2205.04157 (a baseline), Eq. 6.
    """

    target: Target = "probability"
    over_examples: OverExamples = "signed"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        require_seed(self.seed)

    def scorer(self, context: ScoringContext) -> Scorer:
        """Build a scorer that takes one forward and one backward pass a batch."""

        def target(batch: Batch) -> Tensor:
            logits = context.task.logits(context.model, batch)
            return target_of(logits, wrong_labels(batch, logits.shape[-1], self.seed), self.target)

        return OnePass(context.model, context.sites, target, backend=context.backend)


def wrong_labels(batch: Batch, classes: int, seed: int) -> Tensor:
    """Draw a class other than the label for each target position.

    Args:
        batch: The batch, with labels [B, T].
        classes: The number of classes.
        seed: The seed of the draws.

    Returns:
        The classes, int64 [B, T], on the device of the labels. Positions without a label stay without one.

    Raises:
        InputError: There is one class alone.
    """
    if classes == 1:
        raise InputError("criterion: expected one that needs no wrong labels for a model with one output, got rap")
    wrong = batch.labels.to("cpu", copy=True)
    for labels, row in zip(wrong, batch.rows, strict=True):  # labels [T], a view of `wrong`
        real = labels != IGNORED
        drawn = torch.from_numpy(np.random.default_rng((seed, row)).integers(classes - 1, size=int(real.sum())))
        labels[real] = drawn + (drawn >= labels[real])  # Skips the label: classes from the label on move up by one.
    return wrong.to(batch.labels.device)
