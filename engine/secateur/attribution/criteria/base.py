"""The interface of a criterion: what it is called, and the object that scores batches by it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from secateur.attribution.checkpoint import PartialSums
from secateur.attribution.integrated.convergence import Convergence
from secateur.model.sites import Site
from secateur.support.errors import InputError
from secateur.tasks import Batch, Target, Task

OverExamples = Literal["signed", "absolute", "squared"]
Labels = Literal["given", "all"]


class Scorer(ABC):
    """Scores batches of one task on one model, which is in `gates.undisturbed` all the while."""

    @abstractmethod
    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        """Each example's score of each unit, [B, units] by site."""

    def prepare(self, pilot: Batch, checked: frozenset[int], examples: int) -> None:
        """Called first, with a few of the examples, the row numbers of a few others whose scores may be checked, and how many
        examples there are."""
        return None

    def partial_sums(self) -> PartialSums:
        """Called next: what `scores` keeps of batches for `finish` and `convergence`. It changes these very tensors, in place,
        as may the caller: other processes' sums are added, and those of an interrupted run put back."""
        return PartialSums()

    def finish(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called after the last batch: the scores, where they are not the totals over the examples (float64 by site name)."""
        return totals

    def convergence(self) -> Convergence | None:
        """Called last: how exact the scores of all batches are, where they are approximations."""
        return None


class FixedScores(Scorer):
    """Scores that no example changes, float64 [units] by site."""

    def __init__(self, found: Mapping[Site, Tensor]) -> None:
        self._found = found

    def scores(self, batch: Batch) -> dict[Site, Tensor]:
        return {site: scores.expand(len(batch.rows), -1) for site, scores in self._found.items()}

    def finish(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        return {site.name: scores.cpu() for site, scores in self._found.items()}


@dataclass(frozen=True)
class Criterion(ABC):
    """How units are scored; its fields are its settings."""

    labels = "given"  # Not a field: most criteria take the examples as they are.

    @abstractmethod
    def scorer(self, model: nn.Module, task: Task, sites: Sequence[Site], max_tokens: int) -> Scorer:
        """The object that scores batches; max_tokens: padded input tokens of one pass."""

    def batch_tokens(self, max_tokens: int) -> int:
        """Padded tokens of a batch that leaves passes of max_tokens."""
        return max_tokens

    def over(self, scores: Tensor) -> Tensor:
        """[B, units] of single examples to the terms of the sum over examples."""
        return scores

    def to_json(self) -> dict[str, Any]:
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
        for field, kind in (("target", Target), ("over_examples", OverExamples), ("labels", Labels)):
            if getattr(self, field) not in get_args(kind):
                raise InputError(f"{field}: expected one of {', '.join(get_args(kind))}, got {getattr(self, field)!r}")

    def over(self, scores: Tensor) -> Tensor:
        if self.over_examples == "signed":
            return scores
        return scores.abs() if self.over_examples == "absolute" else scores.square()


def require_seed(seed: int) -> None:
    """Raises InputError for what cannot seed a generator."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed: expected a number of at least 0, got {seed!r}")
