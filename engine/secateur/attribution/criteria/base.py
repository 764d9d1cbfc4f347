"""The interface of a criterion: its settings, and the scorer that it builds to score batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

from secateur.attribution.checkpoint import PartialSums
from secateur.attribution.integrated.convergence import Convergence
from secateur.model.sites import Site
from secateur.support.errors import InputError
from secateur.tasks import Batch, Target, Task
from secateur_kernels.backend import Backend

OverExamples = Literal["signed", "absolute", "squared"]
Labels = Literal["given", "all"]


@dataclass(frozen=True)
class ScoringContext:
    """The arguments of one attribution, from which a criterion builds its scorer.

    Attributes:
        model: The model. It is in `undisturbed` while the scorer is built and used.
        task: The task.
        sites: The sites to score.
        max_tokens: The most padded input tokens of one pass.
        pilot: A few of the examples. A criterion may try settings on them.
        examples: The number of examples.
        checked: Row numbers of a few other examples. A criterion may check the scores of these.
        backend: The implementation of the kernels: "auto", "reference" or "triton".
    """

    model: nn.Module
    task: Task
    sites: Sequence[Site]
    max_tokens: int
    pilot: Batch = field(repr=False)
    examples: int
    checked: frozenset[int] = frozenset()
    backend: Backend = "auto"


@dataclass(frozen=True)
class Result:
    """The scores of all batches.

    Attributes:
        scores: Float64 [units] by site name.
        convergence: How exact the scores are, if they are integrals.
        standard_errors: The standard errors of the scores over examples and draws, float64 [units] by site name, if gates are
            drawn at random.
    """

    scores: dict[str, Tensor]
    convergence: Convergence | None = None
    standard_errors: dict[str, Tensor] | None = None


class Scorer(ABC):
    """An object that scores batches of one task on one model. It is ready once it is constructed.

    `attribute.score_batches` calls the methods. It adds up the `scores` of the batches, and asks for the `result` after the
    last batch. Each attribution builds its own scorer.
    """

    @abstractmethod
    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        """Score each unit for each example.

        Args:
            batch: The examples.

        Returns:
            Scores [B, units] by site.
        """

    def partial_sums(self) -> PartialSums:
        """Return the tensors that `scores` changes in place and that `result` reads, in addition to the totals.

        The caller changes these tensors in place too. It adds the sums of other processes, and it restores the sums of an
        interrupted run.

        Returns:
            The tensors. Each call returns the same ones.
        """
        return PartialSums()

    def result(self, totals: dict[str, Tensor]) -> Result:
        """Return the scores of all batches.

        Args:
            totals: Sums of the examples' terms, float64 [units] by site name.

        Returns:
            The scores. By default these are the totals.
        """
        return Result(totals)


class FixedScores(Scorer):
    """Scores that do not depend on the examples.

    Args:
        by_site: The scores, float64 [units] by site.
    """

    def __init__(self, by_site: Mapping[Site, Tensor]) -> None:
        self._by_site = by_site

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        """Return the fixed scores for each example, [B, units] by site."""
        return {site: scores.expand(len(batch.rows), -1) for site, scores in self._by_site.items()}

    def result(self, totals: dict[str, Tensor]) -> Result:
        """Return the fixed scores. The totals over the examples are not used."""
        return Result({site.name: scores.cpu() for site, scores in self._by_site.items()})


@dataclass(frozen=True)
class Criterion(ABC):
    """A way to score units. The fields of the dataclass are its settings.

    A new criterion must override `scorer`. It need not override anything else.

    Attributes:
        labels: "given" if the criterion uses each example's own target, or "all" if it uses all candidate labels in turn. It
            is a class attribute here, and a setting of some criteria.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Ones(Criterion):
        ...     def scorer(self, context: ScoringContext) -> Scorer:
        ...         return FixedScores({site: torch.ones(site.units, dtype=torch.float64) for site in context.sites})
    """

    labels = "given"  # Not a dataclass field, because most criteria use the examples' own targets and have no such setting.

    @abstractmethod
    def scorer(self, context: ScoringContext) -> Scorer:
        """Build the object that scores batches.

        Args:
            context: The arguments of the attribution.

        Returns:
            A scorer, ready for use.
        """

    def batch_tokens(self, max_tokens: int) -> int:
        """Return the most padded input tokens of a batch. A criterion whose passes are larger than batches needs small batches.

        Args:
            max_tokens: The most padded input tokens of one pass.

        Returns:
            The most tokens of a batch. By default this is `max_tokens`.
        """
        return max_tokens

    def over(self, scores: Tensor) -> Tensor:
        """Turn the scores of single examples into the terms of the sum over examples.

        Args:
            scores: The scores of a batch, float64 [B, units].

        Returns:
            The terms, float64 [B, units]. By default these are the scores.
        """
        return scores

    def to_json(self) -> dict[str, Any]:
        """Return the criterion's class name and settings as JSON values."""
        return {"criterion": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class TargetCriterion(Criterion):
    """A criterion that makes scores from derivatives of a target F.

    Attributes:
        target: The target F: "probability", "log_probability" or "margin", summed over the pieces of an example's target.
        over_examples: How the examples' scores add up (each one is a sum over tokens): "signed" as they are, "absolute" as
            absolute values, or "squared" (the empirical Fisher information of the unit's gate).
        labels: "given" uses each example's own target. "all" uses all candidate labels in turn, so that examples need no
            labels.

    Raises:
        InputError: A setting has none of these values.
    """

    target: Target = "log_probability"
    over_examples: OverExamples = "absolute"
    labels: Labels = "given"

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, kind in (("target", Target), ("over_examples", OverExamples), ("labels", Labels)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name}: expected one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    def over(self, scores: Tensor) -> Tensor:
        """Return the scores [B, units] as they are, their absolute values or their squares, as `over_examples` says."""
        if self.over_examples == "signed":
            return scores
        return scores.abs() if self.over_examples == "absolute" else scores.square()


def require_seed(seed: int) -> None:
    """Check that a number can seed a generator.

    Args:
        seed: The number.

    Raises:
        InputError: It is not an integer of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed: expected a number of at least 0, got {seed!r}")
