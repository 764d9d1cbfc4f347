"""sweep: score once, prune at many rates, and measure accuracy, size and speed at each."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor, nn

from secateur.attribution.scores import Scores
from secateur.data.examples import Examples, read_examples
from secateur.measuring.benchmark import benchmark
from secateur.measuring.evaluate import evaluate
from secateur.planning.budget import Budget
from secateur.planning.plan import plan_within
from secateur.pruning.prune import prune
from secateur.support.errors import InputError
from secateur.support.fields import shown
from secateur.tasks import Evaluation, Task
from secateur.tasks.base import require_fit

Recovery = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Point:
    """One rate of a sweep.

    Attributes:
        keep: The share of units that stays at every site; 1 is the dense model.
        metric: The name of the task's metric.
        value: The metric's value.
        low: The lower end of its 95% interval.
        high: The upper end of its 95% interval.
        parameters: Parameters of the model.
        flops: FLOPs of one batch.
        latency_ms: Milliseconds of one batch.
        speedup: Dense time over pruned time.
        examples_per_second: Examples of that batch for each second.
    """

    keep: float
    metric: str
    value: float
    low: float
    high: float
    parameters: int
    flops: int
    latency_ms: float
    speedup: float
    examples_per_second: float

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def sweep(
    model: nn.Module,
    task: Task,
    scores: Scores,
    examples: Examples,
    keeps: Sequence[float],
    batch: Mapping[str, Tensor],
    *,
    align: int = 1,
    per_head: bool = False,
    recovery: Recovery | None = None,
    progress: Callable[[Iterable[float], int], Iterable[float]] | None = None,
) -> list[Point]:
    """Prune at each rate, evaluate on the examples, and time one batch in turn with the dense model.

    Args:
        model: The dense model. It is left untouched.
        task: The task.
        scores: Scores of the units.
        examples: Held-out examples to evaluate on.
        keeps: The rates: shares of units that stay at every site.
        batch: The keyword arguments of the timed forward pass.
        align: As in `plan`.
        per_head: As in `plan`.
        recovery: Refits each pruned model in place.
        progress: Wraps the iteration over rates, given the rates and their number.

    Returns:
        The dense model's point, then one point for each rate.

    Raises:
        InputError: As `plan`, `prune`, `evaluate` and `benchmark` do.
    """
    if not isinstance(keeps, Sequence) or isinstance(keeps, (str, bytes)):
        raise InputError(f"keeps: expected a sequence of numbers in (0, 1], got {shown(keeps)}")
    for keep in keeps:
        Budget("keep", keep)  # Refuses a wrong number before any work.
    require_fit(task, model)
    rows = read_examples(examples, task.columns)
    dense = evaluate(model, task, rows)
    points: list[Point] = []
    for keep in progress(keeps, len(keeps)) if progress else keeps:
        pruned = prune(model, plan_within(scores, Budget("keep", keep), align=align, per_head=per_head))
        if recovery is not None:
            recovery(pruned)
        result = evaluate(pruned, task, rows)
        report = benchmark(model, pruned, [batch])
        (timing,) = report.timings
        rates = timing.examples_per_second
        if not points:
            point = _point(1.0, dense, report.dense_parameters, timing.dense_flops, timing.dense_ms, 1.0, rates[0])
            points.append(point)
        point = _point(keep, result, report.pruned_parameters, timing.pruned_flops, timing.pruned_ms, timing.speedup, rates[1])
        points.append(point)
    return points


def _point(keep: float, result: Evaluation, *measured: Any) -> Point:
    """A point from its rate, its evaluation, and the other fields in order."""
    return Point(keep, result.metric, result.value, result.low, result.high, *measured)


def to_csv(points: Sequence[Point]) -> str:
    """Write the points as CSV with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(point.to_json() for point in points)
    return out.getvalue()
