"""sweep: one attribution, many plans: accuracy against size and speed."""

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
from secateur.planning.plan import plan
from secateur.pruning.prune import prune
from secateur.tasks import Evaluation, Task

Recovery = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Point:
    """One rate of a sweep; keep = 1 is the dense model. Latency in milliseconds and FLOPs are of one batch."""

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
    """Prunes at each rate, evaluates on the examples and times one batch, interleaved with the dense model.

    recovery: refits each pruned model. The first point is the dense model.
    """
    rows = read_examples(examples, task.columns)
    dense = evaluate(model, task, rows)
    points: list[Point] = []
    for keep in progress(keeps, len(keeps)) if progress else keeps:
        pruned = prune(model, plan(scores, keep=keep, align=align, per_head=per_head))
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
    return Point(keep, result.metric, result.value, result.low, result.high, *measured)


def to_csv(points: Sequence[Point]) -> str:
    """The points as CSV with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(point.to_json() for point in points)
    return out.getvalue()
