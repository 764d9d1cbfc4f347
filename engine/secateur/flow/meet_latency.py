"""meet_latency: a plan that delivers a latency, measured on the whole rebuilt model and not only predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.measuring.benchmark import Timing, benchmark
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.discovery import fingerprint
from secateur.planning.latency_table import LatencyTable
from secateur.planning.plan import Plan
from secateur.pruning.prune import prune
from secateur.support.errors import InputError

Make = Callable[[float], Plan]


@dataclass(frozen=True)
class Attempt:
    """One plan that was measured: the milliseconds that it was asked to have, those that the table predicts for it, the whole
    model's timing against the dense one, and by what factor that is slower than what is wanted."""

    plan: Plan
    asked: float
    predicted: float
    timing: Timing
    excess: float

    def to_json(self) -> dict[str, Any]:
        """All but the plan."""
        return {"asked": self.asked, "predicted": self.predicted, "timing": asdict(self.timing), "excess": self.excess}


@dataclass(frozen=True)
class MetLatency:
    """plan: what delivers. timing: of its model against the dense one; `speedup` is the delivered one, with its quartiles.
    history: all that was measured, in order."""

    plan: Plan
    timing: Timing
    history: list[Attempt]

    def to_json(self) -> dict[str, Any]:
        """All but the plans."""
        return {"timing": asdict(self.timing), "history": [attempt.to_json() for attempt in self.history]}


def meet_latency(
    model: nn.Module,
    make: Make,
    table: LatencyTable,
    *,
    speedup: float | None = None,
    latency: float | None = None,
    batch: Mapping[str, Tensor] | None = None,
    tolerance: float = 0.03,
    rounds: int = 5,
    pairs: int = 20,
    seconds: float = 10.0,
) -> MetLatency:
    """Plans, rebuilds the dense model, times it whole, and corrects what it asks for, until the model delivers the speed-up, or
    the milliseconds, to within a factor of 1 + tolerance, to either side.

    make: milliseconds to a plan for which the table predicts at most that many, and about that many; it raises InputError
    where there is none. Exactly one of speedup (dense over pruned) and latency (of a pass on the machine as it is now).
    batch: the model's keyword arguments; by default one of the table's shape. rounds: plans to measure at most. pairs,
    seconds: as in `benchmark`.
    Raises InputError: no target or two, one that no plan delivers (the message says what was measured), another model's table.
    """
    name, wanted = _target(speedup, latency)
    if table.fingerprint != fingerprint(model):
        raise InputError(f"table: expected one of this model (fingerprint {fingerprint(model)}), got {table.fingerprint}")
    if not tolerance > 0 or rounds < 1:
        raise InputError(f"tolerance, rounds: expected positive numbers, got {tolerance} and {rounds}")
    given = batch
    if given is None:
        (given,) = synthetic_batches(model, [table.batch_size], [table.length], target_length=table.target_length)
    ask, history = table.total / wanted if name == "speedup" else wanted, list[Attempt]()
    for _ in range(rounds):
        plan = _untried(make, ask, table.total, history)
        if plan is None:
            break
        predicted = table.milliseconds({site: len(kept) for site, kept in plan.items()})
        timing = benchmark(model, prune(model, plan), [given], pairs=pairs, seconds=seconds).timings[0]
        excess = wanted / timing.speedup if name == "speedup" else timing.pruned_ms / wanted
        history.append(Attempt(plan, ask, predicted, timing, excess))
        if abs(math.log(excess)) <= math.log1p(tolerance):
            return MetLatency(plan, timing, history)
        ask = corrected([(attempt.predicted, attempt.excess) for attempt in history])
    raise InputError(_refusal(history, name, wanted, tolerance))


def corrected(measured: Sequence[tuple[float, float]]) -> float:
    """The milliseconds to ask for next, from pairs of what was predicted and by what factor the model was too slow: between the
    slowest that was too fast and the fastest that was too slow, and in proportion to the last where one of them lacks."""
    fast = max((pair for pair in measured if pair[1] < 1), default=None)
    slow = min((pair for pair in measured if pair[1] >= 1), default=None)
    if fast is None or slow is None or fast[0] >= slow[0]:
        predicted, excess = measured[-1]
        return predicted / excess
    return fast[0] + (slow[0] - fast[0]) * (1 - fast[1]) / (slow[1] - fast[1])


def _target(speedup: float | None, latency: float | None) -> tuple[str, float]:
    given = {name: value for name, value in (("speedup", speedup), ("latency", latency)) if value is not None}
    if len(given) != 1:
        raise InputError(f"target: expected exactly one of speedup, latency, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not math.isfinite(value) or value <= 0 or (name == "speedup" and value < 1):
        raise InputError(
            f"{name}: expected a {'number of at least 1' if name == 'speedup' else 'positive number'}, got {value}"
        )
    return name, value


def _untried(make: Make, ask: float, total: float, history: Sequence[Attempt]) -> Plan | None:
    """The plan for what is asked; where that has been measured, the next one towards the target, if there is one."""
    plan = _nearest(make, ask, total)
    known = _known(plan, history)
    if known is None:
        return plan
    if known.excess > 1:
        low = high = known.predicted * (1 - 1e-6)
    else:
        low = max(ask, known.predicted)
        high = min((other.predicted for other in history if other.predicted > low), default=total * (1 + 1e-9))
    following = _lowest(make, low, high, lambda found: _known(found, [known]) is None)
    return following if following is not None and _known(following, history) is None else None


def _nearest(make: Make, ask: float, total: float) -> Plan:
    """The plan for what is asked, or the fastest that there is: predictions err, so it may deliver all the same."""
    try:
        return make(ask)
    except InputError:
        largest = make(total * (1 + 1e-9))  # Says why where there is no plan at all.
        return _lowest(make, ask, total * (1 + 1e-9), lambda found: True) or largest


def _lowest(make: Make, low: float, high: float, good: Callable[[Plan], bool]) -> Plan | None:
    """The good plan for the fewest milliseconds from low to high, to a thousandth of the distance; all above are good."""

    def at(milliseconds: float) -> Plan | None:
        try:
            plan = make(milliseconds)
        except InputError:
            return None
        return plan if good(plan) else None

    found = at(high)
    for _ in range(10 if found is not None and low < high else 0):
        middle = (low + high) / 2
        plan = at(middle)
        low, high, found = (middle, high, found) if plan is None else (low, middle, plan)
    return found


def _known(plan: Plan, history: Sequence[Attempt]) -> Attempt | None:
    same = (a for a in history if all(torch.equal(kept, a.plan[site]) for site, kept in plan.items()))
    return next(same, None)


def _refusal(history: Sequence[Attempt], name: str, wanted: float, tolerance: float) -> str:
    delivered = {a.excess: a.timing.speedup if name == "speedup" else a.timing.pruned_ms for a in history}
    if min(delivered) > 1:
        closest = delivered[min(delivered)]
        limit = f"at most {closest:.2f}, the highest" if name == "speedup" else f"at least {closest:.2f}, the lowest"
        return f"{name}: expected {limit} that was measured, got {wanted:g}"
    found = ", ".join(f"{value:.2f}" for value in sorted(delivered.values()))
    return f"{name}: expected one that a plan delivers to within {tolerance:.0%}, got {wanted:g}; measured were {found}"
