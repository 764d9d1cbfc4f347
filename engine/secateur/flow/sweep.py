"""sweep: score once, prune within many budgets of one kind, and measure accuracy, size and speed at each."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.attribution.scores import Scores, as_scores
from secateur.data.examples import Examples
from secateur.measuring.benchmark import Timing, benchmark
from secateur.measuring.evaluate import evaluate
from secateur.model.cost import parameters
from secateur.planning.allocation import Allocation
from secateur.planning.budget import Budget
from secateur.planning.latency_table import LatencyTable
from secateur.planning.plan import plan_within
from secateur.pruning.prune import prune
from secateur.support.errors import InputError
from secateur.support.fields import shown
from secateur.support.progress import Progress, counted, require_progress
from secateur.tasks import Evaluation, Task
from secateur.tasks.base import require_fit

Recovery = Callable[[nn.Module], object]
_KINDS = ("keep", "flops", "params", "memory", "speedup")  # The dense model has the amount 1 of each.


@dataclass(frozen=True)
class Point:
    """One budget of a sweep.

    Speed-ups are ratios of passes in turn, so they hold while the machine's speed drifts; milliseconds of different runs do not
    compare. All points therefore share one dense latency, and `latency_ms` is that latency over the speed-up.

    Attributes:
        budget: The kind of budget, such as "keep" or "flops".
        amount: The budget's amount; 1 is the dense model.
        metric: The name of the task's metric.
        value: The metric's value.
        low: The lower end of its 95% interval.
        high: The upper end of its 95% interval.
        examples: The number of evaluated examples.
        parameters: Parameters of the model.
        flops: FLOPs of one batch.
        latency_ms: Milliseconds of one batch: the dense model's median over all runs, divided by `speedup`.
        speedup: Dense time over pruned time: the median of pairs of passes in turn.
        speedup_low: Lower quartile of these ratios.
        speedup_high: Upper quartile of these ratios.
        examples_per_second: Examples of that batch for each second of `latency_ms`.
    """

    budget: str
    amount: float
    metric: str
    value: float
    low: float
    high: float
    examples: int
    parameters: int
    flops: int
    latency_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    examples_per_second: float

    def to_json(self) -> dict[str, Any]:
        """All fields; under a budget of units also the amount under "keep"."""
        return {**({"keep": self.amount} if self.budget == "keep" else {}), **asdict(self)}


def sweep(
    model: nn.Module,
    task: Task,
    scores: Scores | str | Path,
    examples: Examples,
    budgets: Sequence[float | Budget],
    batch: Mapping[str, Tensor],
    *,
    table: LatencyTable | str | Path | None = None,
    allocation: Allocation = "uniform",
    floor: float = 0.0,
    align: int = 1,
    per_head: bool = False,
    recovery: Recovery | None = None,
    progress: Progress | None = None,
) -> list[Point]:
    """Prune within each budget, evaluate on the examples, and time one batch in turn with the dense model.

    Args:
        model: The dense model. It is left untouched.
        task: The task.
        scores: Scores of the units, or the path of their file.
        examples: Held-out examples to evaluate on.
        budgets: Budgets of one kind: keep, flops, params, memory or speedup. A number is a share of units that stays at every
            site. Under a speed-up the plan is the one that `table` predicts; the point tells the measured speed-up.
        batch: The keyword arguments of the timed forward pass.
        table: As in `plan`, for speed-ups.
        allocation: As in `plan`.
        floor: As in `plan`.
        align: As in `plan`.
        per_head: As in `plan`.
        recovery: Refits each pruned model in place.
        progress: True for a progress bar, or a function of (budgets measured, all budgets).

    Returns:
        The dense model's point, then one point for each budget.

    Raises:
        InputError: Budgets are of several kinds, or cannot be met (before any work); or as `prune`, `evaluate` and `benchmark`.
    """
    require_progress(progress)
    wanted = _one_kind(budgets)
    require_fit(task, model)
    scores, options = as_scores(scores), {"table": table, "align": align, "per_head": per_head}
    plans = {b: plan_within(scores, b, allocation=allocation, floor=floor, **options) for b in wanted}  # type: ignore[arg-type]
    rows = task.read(examples)
    dense = evaluate(model, task, rows)
    measured: list[tuple[Budget, Evaluation, int, Timing]] = []
    for budget in counted(progress, "budgets", wanted, len(wanted)):
        pruned = prune(model, plans[budget])
        if recovery is not None:
            recovery(pruned)
        result = evaluate(pruned, task, rows)
        (timing,) = benchmark(model, pruned, [batch]).timings
        measured.append((budget, result, parameters(pruned), timing))
    return _points(dense, parameters(model), measured)


def _one_kind(budgets: Any) -> list[Budget]:
    """The budgets. Raises InputError unless there is one at least, and all are of one kind that a sweep takes."""
    expected = "budgets: expected a list of shares in (0, 1], or of Budgets of one kind"
    if not isinstance(budgets, Sequence) or isinstance(budgets, (str, bytes)) or not budgets:
        raise InputError(f"{expected}, got {shown(budgets)}")
    made = [budget if isinstance(budget, Budget) else Budget("keep", budget) for budget in budgets]
    kinds = {budget.kind for budget in made}
    if len(kinds) > 1 or not kinds <= set(_KINDS):
        raise InputError(f"{expected} of {', '.join(_KINDS)}, got {', '.join(sorted(kinds))}")
    return made


def _points(dense: Evaluation, weights: int, measured: Sequence[tuple[Budget, Evaluation, int, Timing]]) -> list[Point]:
    """The dense model's point and those of the budgets, with one dense latency for all.

    Args:
        dense: The evaluation of the dense model.
        weights: Its parameters.
        measured: For each budget the evaluation, the parameters and the timing of its model.
    """
    milliseconds = statistics.median(timing.dense_ms for *_, timing in measured)
    first, *_, timing = measured[0]
    speed = (milliseconds, 1.0, 1.0, 1.0, 1e3 * timing.batch_size / milliseconds)
    points = [_point(Budget(first.kind, 1.0), dense, weights, timing.dense_flops, *speed)]
    for budget, result, count, timing in measured:
        latency = milliseconds / timing.speedup
        speedups = (timing.speedup, timing.speedup_low, timing.speedup_high)
        speed = (latency, *speedups, 1e3 * timing.batch_size / latency)
        points.append(_point(budget, result, count, timing.pruned_flops, *speed))
    return points


def _point(budget: Budget, result: Evaluation, *measured: Any) -> Point:
    """A point from its budget, its evaluation, and the other fields in order."""
    evaluated = (result.metric, result.value, result.low, result.high, result.examples)
    return Point(budget.kind, budget.amount, *evaluated, *measured)


def to_csv(points: Sequence[Point]) -> str:
    """Write the points as CSV with a header."""
    out = io.StringIO()
    rows = [point.to_json() for point in points]
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
