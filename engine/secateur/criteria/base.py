"""The interface of a criterion: one method to override."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from secateur.errors import InputError
from secateur.tasks.base import Target

OverExamples = Literal["signed", "absolute", "squared"]
Labels = Literal["given", "all"]


@dataclass(frozen=True)
class Criterion(ABC):
    """How activations and gradients become scores.

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

    @abstractmethod
    def token_sum(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """[B, T, channels] twice to each example's score of each channel [B, channels]: a sum over its tokens."""

    def over(self, scores: Tensor) -> Tensor:
        """[B, units] of single examples to the terms of the sum over examples."""
        if self.over_examples == "signed":
            return scores
        return scores.abs() if self.over_examples == "absolute" else scores.square()

    def to_json(self) -> dict[str, Any]:
        return {"criterion": type(self).__name__, **asdict(self)}
