"""Budgets: how much of a model may remain, or how fast it must become."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from secateur.planning.allocation import Allocation
from secateur.support.errors import InputError

BudgetKind = Literal["keep", "flops", "params", "memory", "speedup", "latency"]
_LEAST = math.ulp(0.0)  # The smallest positive float.
_SHARE = (_LEAST, 1.0, "a number in (0, 1]")
# The range of each kind's amount: lowest, highest, and in words.
_RANGES: dict[str, tuple[float, float, str]] = {
    "speedup": (1.0, sys.float_info.max, "a number of at least 1"),
    "latency": (_LEAST, sys.float_info.max, "a positive number of milliseconds"),
}
_WORDS: dict[str, str] = {
    "keep": "{:.1%} of the units of every site",
    "flops": "at most {:.1%} of the layers' FLOPs",
    "params": "at most {:.1%} of the layers' parameters",
    "memory": "at most {:.1%} of all weights",
    "speedup": "{:g} times as fast as the dense model",
    "latency": "{:g} milliseconds a forward pass",
}


@dataclass(frozen=True)
class Budget:
    """How much of a model may remain, or how fast it must become.

    Attributes:
        kind: What is limited. `keep`: the share of units that stays at every site. `flops`, `params`: the share of the
            layers' multiply-adds or parameters that may remain. `memory`: the share of all the model's weights, embeddings
            included. `speedup`: dense time over pruned time. `latency`: milliseconds of one forward pass.
        amount: The limit. A share lies in (0, 1], a speed-up is at least 1, a latency is positive.

    Raises:
        InputError: The kind is unknown, or the amount is out of its range.

    Example:
        `Budget("flops", 0.5)` is the same as `Budget.of(flops=0.5)`.
    """

    kind: BudgetKind
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(BudgetKind):
            raise InputError(f"budget: expected one of {', '.join(get_args(BudgetKind))}, got {self.kind!r}")
        low, high, expected = _RANGES.get(self.kind, _SHARE)
        if not isinstance(self.amount, Real) or isinstance(self.amount, bool):
            raise InputError(f"{self.kind}: expected {expected}, got {self.amount!r}")
        if not low <= self.amount <= high:
            raise InputError(f"{self.kind}: expected {expected}, got {self.amount}")

    @classmethod
    def of(cls, **amounts: float | None) -> Budget:
        """Make the budget from keywords, of which exactly one is given.

        Args:
            amounts: Amounts by kind. None stands for a budget that is not given.

        Raises:
            InputError: No budget or several are given, the kind is unknown, or the amount is out of its range.
        """
        given = {kind: amount for kind, amount in amounts.items() if amount is not None}
        if len(given) != 1:
            known = ", ".join(get_args(BudgetKind))
            raise InputError(f"budget: expected exactly one of {known}, got {', '.join(given) or 'none'}")
        ((kind, amount),) = given.items()
        return cls(kind, amount)  # type: ignore[arg-type] # The constructor checks it.

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Budget:
        """Take the budget out of keyword arguments and leave the others there. Raises InputError as `of` does."""
        return cls.of(**{kind: options.pop(kind) for kind in get_args(BudgetKind) if kind in options})

    @property
    def measured(self) -> bool:
        """Whether the budget is one of time, which a latency table predicts."""
        return self.kind in ("speedup", "latency")

    def milliseconds(self, dense: float) -> float:
        """The pruned model's milliseconds that a budget of time asks for; `dense` are those of the dense model."""
        return dense / self.amount if self.kind == "speedup" else self.amount

    def after(self, number: int, rounds: int) -> Budget:
        """The budget after round `number` of `rounds`, when each round removes the same factor of what is left."""
        return Budget(self.kind, self.amount ** (number / rounds))

    def check_spread(self, allocation: str, floor: float, align: int = 1) -> None:
        """Check how the budget is to be spread over the sites.

        Args:
            allocation: "uniform", "global" or "knapsack".
            floor: The share of its units that every site keeps at least.
            align: FFN widths are multiples of it.

        Raises:
            InputError: The allocation is unknown, or `keep` does not take it; the floor or the alignment is out of range; or
                the floor is larger than the share to keep.
        """
        if not isinstance(align, Integral) or align < 1:
            raise InputError(f"align: expected a positive number, got {align!r}")
        if not isinstance(floor, Real) or not 0 <= floor <= 1:
            raise InputError(f"floor: expected a number in [0, 1], got {floor!r}")
        if self.kind == "keep" and floor > self.amount:
            raise InputError(f"floor: expected at most the share to keep, {self.amount}, got {floor!r}")
        if allocation not in get_args(Allocation):
            raise InputError(f"allocation: expected one of {', '.join(get_args(Allocation))}, got {allocation!r}")
        if self.kind == "keep" and allocation != "uniform":
            raise InputError(f"allocation: expected uniform with keep, which is one share for all sites, got {allocation!r}")

    def __str__(self) -> str:
        return _WORDS[self.kind].format(self.amount)
