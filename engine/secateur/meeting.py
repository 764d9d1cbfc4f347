"""meet_latency: a plan that delivers a latency, measured on the whole rebuilt model and not only predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.benchmarking import Timing, benchmark, synthetic_batches
from secateur.discovery import fingerprint
from secateur.errors import InputError
from secateur.latency import LatencyTable
from secateur.planning import Plan
from secateur.surgery import prune

Make = Callable[[float], Plan]


@dataclass(frozen=True)
class Attempt:
    """One plan that was measured: the milliseconds that it was asked to have, those that the table predicts for it, and the
    whole model's timing against the dense one."""

    asked: float
    predicted: float
    timing: Timing


@dataclass(frozen=True)
class MetLatency:
    """plan: what delivers. timing: of its model against the dense one; `speedup` is the delivered one, with its quartiles.
    history: all that was measured, in order."""

    plan: Plan
    timing: Timing
    history: list[Attempt]

    def to_json(self) -> dict[str, Any]:
        """All but the plan."""
        return {"timing": asdict(self.timing), "history": [asdict(attempt) for attempt in self.history]}


def meet_latency(
    model: nn.Module,
    make: Make,
    table: LatencyTable,
    *,
    speedup: float | None = None,
    target_ms: float | None = None,
    batch: Mapping[str, Tensor] | None = None,
    tolerance: float = 0.03,
    rounds: int = 5,
    pairs: int = 20,
    seconds: float = 10.0,
) -> MetLatency:
    """Plans, rebuilds the dense model, times it whole, and corrects what it asks for, until the model delivers the speed-up, or
    the milliseconds, to within a factor of 1 + tolerance, to either side.

    make: milliseconds to a plan for which the table predicts at most that many, and about that many; it raises InputError
    where there is none. Exactly one of speedup (dense over pruned) and target_ms (of a pass on the machine as it is now).
    batch: the model's keyword arguments; by default one of the table's shape. rounds: plans to measure at most. pairs,
    seconds: as in `benchmark`.
    Raises InputError: no target or two, one that no plan delivers (the message says what was measured), another model's table.
    """
    name, wanted = _target(speedup, target_ms)
    if table.fingerprint != fingerprint(model):
        raise InputError(f"table: expected one of this model (fingerprint {fingerprint(model)}), got {table.fingerprint}")
    if not tolerance > 0 or rounds < 1:
        raise InputError(f"tolerance, rounds: expected positive numbers, got {tolerance} and {rounds}")
    given = batch
    if given is None:
        (given,) = synthetic_batches(model, [table.batch_size], [table.length], target_length=table.target_length)
    ask, plans, history = table.total / wanted if name == "speedup" else wanted, list[Plan](), list[Attempt]()
    for _ in range(rounds):
        plan = _nearest(make, ask, table.total)
        if any(_same(plan, other) for other in plans):
            break
        timing = benchmark(model, prune(model, plan), [given], pairs=pairs, seconds=seconds).timings[0]
        plans.append(plan)
        history.append(Attempt(ask, table.milliseconds({site: len(kept) for site, kept in plan.items()}), timing))
        if abs(math.log(_excess(timing, name, wanted))) <= math.log1p(tolerance):
            return MetLatency(plan, timing, history)
        ask = corrected([(attempt.predicted, _excess(attempt.timing, name, wanted)) for attempt in history])
    raise InputError(_refusal([attempt.timing for attempt in history], name, wanted, tolerance))


def corrected(measured: Sequence[tuple[float, float]]) -> float:
    """The milliseconds to ask for next, from pairs of what was predicted and by what factor the model was too slow: between the
    slowest that was too fast and the fastest that was too slow, and in proportion to the last where one of them lacks."""
    fast = max((pair for pair in measured if pair[1] < 1), default=None)
    slow = min((pair for pair in measured if pair[1] >= 1), default=None)
    if fast is None or slow is None or fast[0] >= slow[0]:
        predicted, excess = measured[-1]
        return predicted / excess
    return fast[0] + (slow[0] - fast[0]) * (1 - fast[1]) / (slow[1] - fast[1])


def _target(speedup: float | None, target_ms: float | None) -> tuple[str, float]:
    given = {name: value for name, value in (("speedup", speedup), ("target_ms", target_ms)) if value is not None}
    if len(given) != 1:
        raise InputError(f"target: expected exactly one of speedup, target_ms, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not math.isfinite(value) or value <= 0 or (name == "speedup" and value < 1):
        raise InputError(
            f"{name}: expected a {'number of at least 1' if name == 'speedup' else 'positive number'}, got {value}"
        )
    return name, value


def _nearest(make: Make, ask: float, total: float) -> Plan:
    """The plan for what is asked, or the fastest that there is: predictions err, so it may deliver all the same."""
    try:
        return make(ask)
    except InputError:
        plan = make(total * (1 + 1e-9))
    low, high = min(ask, total), total
    for _ in range(12):
        middle = (low + high) / 2
        try:
            plan, high = make(middle), middle
        except InputError:
            low = middle
    return plan


def _same(plan: Plan, other: Plan) -> bool:
    return all(torch.equal(kept, other[site]) for site, kept in plan.items())


def _excess(timing: Timing, name: str, wanted: float) -> float:
    """By what factor the model is too slow."""
    return wanted / timing.speedup if name == "speedup" else timing.pruned_ms / wanted


def _refusal(timings: Sequence[Timing], name: str, wanted: float, tolerance: float) -> str:
    delivered = {t.speedup if name == "speedup" else t.pruned_ms: _excess(t, name, wanted) for t in timings}
    closest = min(delivered, key=lambda value: abs(math.log(delivered[value])))
    if min(delivered.values()) > 1:
        limit = f"at most {closest:.2f}, the highest" if name == "speedup" else f"at least {closest:.2f}, the lowest"
        return f"{name}: expected {limit} that was measured, got {wanted:g}"
    found = ", ".join(f"{value:.2f}" for value in sorted(delivered))
    return f"{name}: expected one that a plan delivers to within {tolerance:.0%}, got {wanted:g}; measured were {found}"
