"""The interface of a criterion: what it is called, and the object that scores batches by it."""

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
    """Everything that a criterion may need to build its scorer: the arguments of one attribution.

    Attributes:
        model: The model. It is in `undisturbed` while the scorer is built and used.
        task: The task.
        sites: The sites to score.
        max_tokens: The most padded input tokens of one pass.
        pilot: A few of the examples, to try settings on.
        examples: How many examples there are.
        checked: Row numbers of a few other examples, whose scores a criterion may check.
        backend: Of the kernels.
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
    """What a scorer makes of all batches.

    Attributes:
        scores: Float64 [units] by site name.
        convergence: How exact the scores are, where they are approximations.
    """

    scores: dict[str, Tensor]
    convergence: Convergence | None = None


class Scorer(ABC):
    """Scores batches of one task on one model. It is ready once it is constructed.

    `attribute.score_batches` calls these methods: it adds up the `scores` of the batches and asks for the `result` after the
    last batch. Each attribution has a scorer of its own.
    """

    @abstractmethod
    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        """Return each example's score of each unit, [B, units] by site."""

    def partial_sums(self) -> PartialSums:
        """Return the tensors that `scores` changes in place and `result` reads, beside the totals.

        These are always the same tensors. The caller changes them in place too: it adds the sums of other processes and puts
        back those of an interrupted run.
        """
        return PartialSums()

    def result(self, totals: dict[str, Tensor]) -> Result:
        """Return the scores of all batches.

        Args:
            totals: Sums of the examples' terms, float64 [units] by site name. By default these are the scores.
        """
        return Result(totals)


class FixedScores(Scorer):
    """Scores that no example changes, float64 [units] by site."""

    def __init__(self, by_site: Mapping[Site, Tensor]) -> None:
        self._by_site = by_site

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        return {site: scores.expand(len(batch.rows), -1) for site, scores in self._by_site.items()}

    def result(self, totals: dict[str, Tensor]) -> Result:
        return Result({site.name: scores.cpu() for site, scores in self._by_site.items()})


@dataclass(frozen=True)
class Criterion(ABC):
    """How units are scored. Its fields are its settings.

    A new criterion overrides `scorer` and nothing else, unless it needs more.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Ones(Criterion):
        ...     def scorer(self, context: ScoringContext) -> Scorer:
        ...         return FixedScores({site: torch.ones(site.units, dtype=torch.float64) for site in context.sites})
    """

    labels = "given"  # Not a field: most criteria take the examples as they are.

    @abstractmethod
    def scorer(self, context: ScoringContext) -> Scorer:
        """Return an object that is ready to score batches."""

    def batch_tokens(self, max_tokens: int) -> int:
        """Return the padded tokens of a batch that leaves passes of max_tokens."""
        return max_tokens

    def over(self, scores: Tensor) -> Tensor:
        """Turn scores [B, units] of single examples into the terms of the sum over examples."""
        return scores

    def to_json(self) -> dict[str, Any]:
        """Return the criterion's name and settings."""
        return {"criterion": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class TargetCriterion(Criterion):
    """How derivatives of a target become scores.

    target: F, summed over an example's target pieces. over_examples: how examples' token sums add up: as they are, as
    absolute values, or squared (the empirical Fisher information of the unit's gate).
    labels: each example's own target, or all candidate labels in turn, so that no labels are needed.
    """

    target: Target = "log_probability"
    over_examples: OverExamples = "absolute"
    labels: Labels = "given"

    def __post_init__(self) -> None:
        for name, kind in (("target", Target), ("over_examples", OverExamples), ("labels", Labels)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name}: expected one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    def over(self, scores: Tensor) -> Tensor:
        if self.over_examples == "signed":
            return scores
        return scores.abs() if self.over_examples == "absolute" else scores.square()


def require_seed(seed: int) -> None:
    """Raises InputError for what cannot seed a generator."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed: expected a number of at least 0, got {seed!r}")
