"""meet_latency: find a plan whose rebuilt model, timed whole, delivers a latency. A prediction alone does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.measuring.benchmark import Timing, benchmark
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.discovery import fingerprint
from secateur.planning.budget import Budget
from secateur.planning.latency_table import LatencyTable, as_table
from secateur.planning.plan import Plan
from secateur.pruning.prune import prune
from secateur.support.errors import InputError
from secateur.support.html import html_table
from secateur.support.progress import Progress, reporting
from secateur.support.tensors import same_tensors

PlanFor = Callable[[float], Plan]  # From milliseconds to a plan; see `meet_latency`.
_JUST_ABOVE = 1 + 1e-9
_JUST_BELOW = 1 - 1e-6


@dataclass(frozen=True)
class Attempt:
    """One plan that was measured.

    Attributes:
        plan: The plan.
        asked: The milliseconds that the plan was asked to have.
        predicted: The milliseconds that the table predicts for the plan.
        timing: The timing of the rebuilt model against the dense one.
        excess: The delivered time over the wanted time. Above 1 the model is too slow.
    """

    plan: Plan
    asked: float
    predicted: float
    timing: Timing
    excess: float

    def to_json(self) -> dict[str, Any]:
        """All fields but the plan."""
        return {"asked": self.asked, "predicted": self.predicted, "timing": asdict(self.timing), "excess": self.excess}


@dataclass(frozen=True, repr=False)
class MetLatency:
    """A plan that delivers a latency.

    Attributes:
        plan: The plan.
        timing: The timing of its model against the dense one. `timing.speedup` is the delivered speed-up, with its quartiles.
        history: All attempts in order. The last one delivers.
    """

    plan: Plan
    timing: Timing
    history: list[Attempt]

    def __repr__(self) -> str:
        return f"MetLatency({self.timing!r}, plans measured: {len(self.history)})"

    def _repr_html_(self) -> str:
        rows = [
            (f"{a.asked:.3g}", f"{a.predicted:.3g}", f"{a.timing.pruned_ms:.3g}", f"{a.timing.speedup:.2f}x")
            for a in self.history
        ]
        return html_table(repr(self.timing), ("asked ms", "predicted ms", "measured ms", "speed-up"), rows)

    def to_json(self) -> dict[str, Any]:
        """All fields but the plans."""
        return {"timing": asdict(self.timing), "history": [attempt.to_json() for attempt in self.history]}


def meet_latency(
    model: nn.Module,
    plan_for: PlanFor,
    table: LatencyTable | str | Path,
    *,
    speedup: float | None = None,
    latency: float | None = None,
    batch: Mapping[str, Tensor] | None = None,
    tolerance: float = 0.03,
    rounds: int = 5,
    pairs: int = 20,
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> MetLatency:
    """Plan, rebuild the model, time it whole, and correct the milliseconds that are asked for, until the model delivers.

    The model delivers when its speed-up or its milliseconds are within a factor of 1 + tolerance of the wanted ones, to either
    side. Exactly one of `speedup` and `latency` is given.

    Args:
        model: The dense model. It is left untouched.
        plan_for: A function from milliseconds to a plan. The table predicts at most that many milliseconds for the plan, and
            about that many. The function raises InputError where there is no plan.
        table: The latency table of the model, or the path of its file.
        speedup: The wanted dense time over pruned time.
        latency: The wanted milliseconds of a forward pass, on the machine as it is now.
        batch: The model's keyword arguments in a timed pass. By default a drawn batch of the table's shape.
        tolerance: How far the delivered time may be from the wanted one, as a share.
        rounds: The highest number of plans to measure.
        pairs: As in `benchmark`.
        seconds: As in `benchmark`.
        progress: True for a progress bar, or a function of (plans measured, `rounds`). It ends at (`rounds`, `rounds`) also
            where an earlier plan delivers.

    Returns:
        The plan that delivers, its timing and all attempts.

    Raises:
        InputError: There is no target or there are two; no plan delivers the target (the message says what was measured); the
            table is of another model.
    """
    target, table = _target(speedup, latency), as_table(table)
    if table.fingerprint != fingerprint(model):
        raise InputError(f"table: expected one of this model (fingerprint {fingerprint(model)}), got {table.fingerprint}")
    if not tolerance > 0 or rounds < 1:
        raise InputError(f"tolerance, rounds: expected positive numbers, got {tolerance} and {rounds}")
    if batch is None:
        (batch,) = synthetic_batches(model, [table.batch_size], [table.length], target_length=table.target_length)
    asked, history = target.milliseconds(table.total), list[Attempt]()
    with reporting(progress, "correcting") as report:
        for number in range(rounds):
            report(number, rounds)
            plan = _untried(plan_for, asked, table.total, history)
            if plan is None:
                break
            predicted = table.milliseconds({site: len(kept) for site, kept in plan.items()})
            timing = benchmark(model, prune(model, plan), [batch], pairs=pairs, seconds=seconds).timings[0]
            excess = target.amount / timing.speedup if target.kind == "speedup" else timing.pruned_ms / target.amount
            history.append(Attempt(plan, asked, predicted, timing, excess))
            if abs(math.log(excess)) <= math.log1p(tolerance):
                report(rounds, rounds)
                return MetLatency(plan, timing, history)
            asked = corrected([(attempt.predicted, attempt.excess) for attempt in history])
    raise InputError(_refusal(history, target, tolerance))


def corrected(measured: Sequence[tuple[float, float]]) -> float:
    """Compute the milliseconds to ask for next.

    They are interpolated between the slowest plan that was too fast and the fastest plan that was too slow. Where there is no
    plan of one kind, or the two contradict each other, they are in proportion to the last attempt.

    Args:
        measured: For each attempt the predicted milliseconds, and the delivered time over the wanted time.

    Returns:
        Milliseconds.
    """
    fast = max((pair for pair in measured if pair[1] < 1), default=None)
    slow = min((pair for pair in measured if pair[1] >= 1), default=None)
    if fast is None or slow is None or fast[0] >= slow[0]:
        predicted, excess = measured[-1]
        return predicted / excess
    return fast[0] + (slow[0] - fast[0]) * (1 - fast[1]) / (slow[1] - fast[1])


def _target(speedup: float | None, latency: float | None) -> Budget:
    """The one target that is given. Raises InputError for none, two, or one out of its range."""
    given = {kind: amount for kind, amount in (("speedup", speedup), ("latency", latency)) if amount is not None}
    if len(given) != 1:
        raise InputError(f"target: expected exactly one of speedup, latency, got {', '.join(given) or 'none'}")
    return Budget.of(**given)


def _untried(plan_for: PlanFor, asked: float, total: float, history: Sequence[Attempt]) -> Plan | None:
    """The plan for the milliseconds that are asked for. Where that plan has been measured, the next plan towards the target, or
    None if there is none. `total`: milliseconds of the dense model."""
    plan = _nearest(plan_for, asked, total)
    attempt = _attempt_with(plan, history)
    if attempt is None:
        return plan
    if attempt.excess > 1:
        low = high = attempt.predicted * _JUST_BELOW
    else:
        low = max(asked, attempt.predicted)
        high = min((other.predicted for other in history if other.predicted > low), default=total * _JUST_ABOVE)
    following = _fastest(plan_for, low, high, lambda plan: _attempt_with(plan, [attempt]) is None)
    return following if following is not None and _attempt_with(following, history) is None else None


def _nearest(plan_for: PlanFor, asked: float, total: float) -> Plan:
    """The plan for the milliseconds that are asked for, or else the fastest plan there is: predictions err, so it may deliver
    all the same."""
    try:
        return plan_for(asked)
    except InputError:
        largest = plan_for(total * _JUST_ABOVE)  # Raises InputError with the reason where there is no plan at all.
        return _fastest(plan_for, asked, total * _JUST_ABOVE, lambda plan: True) or largest


def _fastest(plan_for: PlanFor, low: float, high: float, accepts: Callable[[Plan], bool]) -> Plan | None:
    """The accepted plan for the fewest milliseconds from low to high, to a thousandth of their distance. It assumes that the
    plans for more milliseconds than an accepted one's are accepted too."""

    def at(milliseconds: float) -> Plan | None:
        try:
            plan = plan_for(milliseconds)
        except InputError:
            return None
        return plan if accepts(plan) else None

    fastest = at(high)
    for _ in range(10 if fastest is not None and low < high else 0):
        middle = (low + high) / 2
        plan = at(middle)
        low, high, fastest = (middle, high, fastest) if plan is None else (low, middle, plan)
    return fastest


def _attempt_with(plan: Plan, history: Sequence[Attempt]) -> Attempt | None:
    """The first attempt that keeps the same units as the plan."""
    return next((attempt for attempt in history if same_tensors(plan.kept, attempt.plan.kept)), None)


def _refusal(history: Sequence[Attempt], target: Budget, tolerance: float) -> str:
    """The message for a target that no plan delivers: the closest that was measured, or all that was measured.

    It says so where the timings scatter by more than the tolerance: on a calm machine the same target may be met.
    """
    by_speed, wanted = target.kind == "speedup", target.amount
    delivered = {a.excess: a.timing.speedup if by_speed else a.timing.pruned_ms for a in history}
    widest = max((attempt.timing for attempt in history), key=lambda timing: timing.speedup_high / timing.speedup_low)
    low, high = widest.speedup_low, widest.speedup_high
    scatter = f"; the runs scatter (quartiles {low:.2f} to {high:.2f}): was the machine busy?"
    why = scatter if high / low > (1 + tolerance) ** 2 else ""
    if min(delivered) > 1:
        closest = delivered[min(delivered)]
        limit = f"at most {closest:.2f}, the highest" if by_speed else f"at least {closest:.2f}, the lowest"
        return f"{target.kind}: expected {limit} that was measured, got {wanted:g}{why}"
    measured = ", ".join(f"{value:.2f}" for value in sorted(delivered.values()))
    expected = f"expected one that a plan delivers to within {tolerance:.0%}"
    return f"{target.kind}: {expected}, got {wanted:g}; measured were {measured}{why}"
