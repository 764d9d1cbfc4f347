"""Owen sampling: gradients at gates that are open or closed at random, as they are once much of the model is gone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from secateur.attribution.checkpoint import PartialSums
from secateur.attribution.criteria.base import Result, Scorer, ScoringContext, TargetCriterion, require_seed
from secateur.attribution.gates import gate_gradients
from secateur.model.discovery import scored_ports
from secateur.model.sites import Site
from secateur.support.errors import InputError
from secateur.support.fields import require_count, shown
from secateur.support.tensors import on_cpu
from secateur.tasks import Batch
from secateur.tasks.batches import model_device

_GOLDEN = (math.sqrt(5) - 1) / 2  # The multiples of it, modulo 1, fill 0 ... 1 evenly, however many there are.


@dataclass(frozen=True)
class OwenSampling(TargetCriterion):
    """Gradients at random gates, an estimate of Shapley values: what a unit does where other units are gone too.

    For each example a share is drawn from U(lowest, 1). Each unit of each site has a gate c, which is 1 with this probability
    and 0 otherwise. The unit's score for the example is dF/dc at these gates. It costs one forward and one backward pass, as
    `GradientActivation` does, which takes the derivative where all gates are 1.

    With `lowest=0` and over_examples="signed", the expected score is the integral of the multilinear extension's derivative
    along the diagonal (Owen 1972), with F's derivative in place of the difference F(c_i = 1) - F(c_i = 0). It is the Shapley
    value where F is linear in each gate. Shares below 0.3 tell of models that no budget leaves, so the default draws none.

    Draws depend on the seed and on the example's row alone. The shares of neighbouring draws are spread evenly (multiples of
    the golden ratio), and each second draw has the opposite uniform numbers of the first one (antithetic draws).
    `Scores.standard_errors` tells how far the scores would differ for other examples and draws.

    A gate on a channel of queries and keys multiplies the query. (Under `GradientActivation` it multiplies both, which gives
    twice the derivative where all gates are 1.)

    Attributes:
        target: The target F, as in `GradientActivation`.
        over_examples: How the examples' scores add up, as in `GradientActivation`. Each example's score is the mean over its
            samples.
        labels: Each example's own target or all candidate labels, as in `GradientActivation`.
        lowest: The lowest share of open gates, at least 0 and below 1.
        samples: The number of draws for each example. Each costs a forward and a backward pass.
        seed: The seed of the draws.

    Raises:
        InputError: A setting is out of range.

    Example:
        >>> scores = secateur.attribute(model, task, examples, criterion="owen:samples=2")
        >>> scores.standard_errors["encoder.0.ffn"]  # float64 [units]

    Reference:
        Owen 1972, Multilinear extensions of games, Management Science 18(5): the integral. Okhrati and Lipani 2021,
        arXiv 2010.12082: its estimation by samples, with antithetic ones. Their shares lie on a fixed grid. The grid here has a
        random start, so that the estimate is unbiased.
    """

    lowest: float = 0.3
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if isinstance(self.lowest, bool) or not isinstance(self.lowest, (int, float)) or not 0 <= self.lowest < 1:
            raise InputError(f"lowest: expected a share of at least 0 and below 1, got {shown(self.lowest)}")
        require_count("samples", self.samples)
        require_seed(self.seed)

    def scorer(self, context: ScoringContext) -> Scorer:
        """Build a scorer that takes one forward and one backward pass for each sample of a batch."""
        return _AtRandomGates(self, context)

    def open_gates(self, units: int, row: int, sample: int) -> Tensor:
        """Draw the gates of one example.

        Args:
            units: The number of units of all sites.
            row: The example's row.
            sample: The number of the sample.

        Returns:
            Which gates are open, bool [units].
        """
        number = row * self.samples + sample
        uniform = np.random.default_rng((self.seed, number // 2)).random(units, dtype=np.float32)
        if number % 2:
            uniform = 1 - uniform
        start = np.random.default_rng((self.seed,)).random()
        share = self.lowest + (1 - self.lowest) * ((start + number * _GOLDEN) % 1)
        return torch.from_numpy(uniform < share)


class _AtRandomGates(Scorer):
    """A scorer by gradients at random gates. It keeps sums of squares for the standard errors."""

    def __init__(self, criterion: OwenSampling, context: ScoringContext) -> None:
        self._criterion, self._context = criterion, context
        self._ports = {site: ports[:1] for site, ports in scored_ports(context.model, context.sites).items()}
        self._widths = [site.units for site in context.sites]
        sizes = {"count": 1, **{f"square/{site.name}": site.units for site in context.sites}}
        self._sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        """Return the means over the samples of dF/dc at random gates, [B, units] by site."""
        context, samples = self._context, self._criterion.samples
        target = partial(context.task.target, context.model, batch, self._criterion.target)
        means: dict[Site, Tensor] = {}
        for sample in range(samples):
            gates = self._gates(batch.rows, sample)
            _, of_sample = gate_gradients(context.model, self._ports, target, gates, backend=context.backend)
            for site, gradients in of_sample.items():
                term = gradients.double() / samples
                means[site] = means[site] + term if site in means else term
        squares = on_cpu([self._criterion.over(mean).square().sum(0) for mean in means.values()])  # [units] each
        self._sums["count"] += len(batch.rows)
        for site, square in zip(means, squares, strict=True):
            self._sums[f"square/{site.name}"] += square
        return means

    def partial_sums(self) -> PartialSums:
        """Return the number of terms, and the sums of their squares by site."""
        return PartialSums(dict(self._sums))

    def result(self, totals: dict[str, Tensor]) -> Result:
        """Return the totals with their standard errors: for n terms t, sqrt(n / (n - 1) * (sum t^2 - (sum t)^2 / n))."""
        count = float(self._sums["count"])
        if count < 2:
            return Result(totals)
        spreads = {name: (self._sums[f"square/{name}"] - total.square() / count).clamp(min=0) for name, total in totals.items()}
        return Result(totals, standard_errors={name: (count / (count - 1) * value).sqrt() for name, value in spreads.items()})

    def _gates(self, rows: Sequence[int], sample: int) -> dict[Site, Tensor]:
        """Draw which gates are open, bool [B, units] by site. Products with it keep the dtype of the activations."""
        drawn = torch.stack([self._criterion.open_gates(sum(self._widths), row, sample) for row in rows])
        of_sites = torch.split(drawn.to(model_device(self._context.model)), self._widths, 1)
        return dict(zip(self._context.sites, of_sites, strict=True))
