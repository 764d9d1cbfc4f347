"""Budgets: which one is asked for, and which spreads it allows."""

from __future__ import annotations

import math
from typing import get_args

from secateur.planning.allocation import Allocation
from secateur.support.errors import InputError

# Budgets that a latency table stands for: from, to, and in words.
_MEASURED = {
    "speedup": (1.0, math.inf, "a number of at least 1"),
    "latency": (math.ulp(0.0), math.inf, "a positive number of milliseconds"),
}


def the_budget(**budgets: float | None) -> tuple[str, float]:
    """Name and value of the one budget that is given. Raises InputError: none or several, or one out of its range."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise InputError(f"budget: expected exactly one of {', '.join(budgets)}, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    low, high, expected = _MEASURED.get(name, (math.ulp(0.0), 1.0, "a number in (0, 1]"))
    if not low <= value <= high:
        raise InputError(f"{name}: expected {expected}, got {value}")
    return name, value


def check_spread(budget: str, allocation: str, floor: float, align: int) -> None:
    """Raises InputError: an unknown allocation, or one that the budget does not take; a floor or an alignment out of range."""
    if align < 1:
        raise InputError(f"align: expected a positive number, got {align}")
    if not 0 <= floor <= 1:
        raise InputError(f"floor: expected a number in [0, 1], got {floor}")
    if allocation not in get_args(Allocation):
        raise InputError(f"allocation: expected one of {', '.join(get_args(Allocation))}, got {allocation!r}")
    if budget == "keep" and allocation != "uniform":
        raise InputError(f"allocation: expected uniform with keep, which is one share for all sites, got {allocation!r}")
