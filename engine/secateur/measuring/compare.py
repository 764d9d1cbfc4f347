"""compare: evaluate and time a dense model and its pruned one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.data.examples import Examples
from secateur.measuring.benchmark import Report, benchmark
from secateur.measuring.evaluate import evaluate
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.cost import parameters
from secateur.support.html import html_table
from secateur.support.progress import Progress
from secateur.tasks import Evaluation, Task


@dataclass(frozen=True, repr=False)
class Comparison:
    """A dense model beside its pruned one.

    Attributes:
        evaluation: The task's metric of "dense" and "pruned"; empty where there were no held-out examples.
        parameters: The numbers of parameters of "dense" and "pruned".
        benchmark: The timings.
    """

    evaluation: dict[str, Evaluation]
    parameters: dict[str, int]
    benchmark: Report

    def rows(self) -> list[tuple[str, str, str]]:
        """Each metric and the parameters, with the dense model's number and the pruned model's."""
        dense, pruned = self.parameters["dense"], self.parameters["pruned"]
        rows = [("parameters", f"{dense:,}", f"{pruned:,} ({pruned / dense:.0%})")]
        if self.evaluation:
            pairs = zip(self.evaluation["dense"].metrics, self.evaluation["pruned"].metrics, strict=True)
            rows[:0] = [(one.metric, f"{one.value:.4f}", f"{two.value:.4f}") for one, two in pairs]
        return rows

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.about()})"

    def about(self) -> str:
        """The metrics, the parameters and the speed-ups, dense and pruned, in one line."""
        figures = [f"{name} {dense} -> {pruned}" for name, dense, pruned in self.rows()]
        speedups = [f"{t.speedup:.2f}x at {t.batch_size} x {t.length}" for t in self.benchmark.timings]
        return ", ".join([*figures, *speedups])

    def _repr_html_(self) -> str:
        speedups = [
            (f"ms at {t.batch_size} x {t.length}", f"{t.dense_ms:.1f}", f"{t.pruned_ms:.1f} ({t.speedup:.2f}x)")
            for t in self.benchmark.timings
        ]
        return html_table("dense and pruned", ("", "dense", "pruned"), [*self.rows(), *speedups])

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "evaluation": {name: metric.to_json() for name, metric in self.evaluation.items()},
            "parameters": dict(self.parameters),
            "benchmark": self.benchmark.to_json(),
        }


def compare(
    dense: nn.Module,
    pruned: nn.Module,
    task: Task,
    examples: Examples | None,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    *,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate both models on held-out examples, and time them in turn on drawn batches.

    Args:
        dense: The dense model.
        pruned: The pruned model.
        task: The task.
        examples: Held-out examples; None to evaluate nothing.
        batch_sizes: Batch sizes to time.
        lengths: Input lengths to time, in tokens.
        say: Receives a line before each step.
        progress: As in `evaluate` and `benchmark`: each evaluation and the timing count from 0.

    Returns:
        The evaluations, the sizes and the timings.

    Raises:
        InputError: As `evaluate` and `benchmark` do.
    """
    evaluation = {}
    if examples is not None:
        rows = task.read(examples)
        if say is not None:
            say(f"evaluating on {len(rows)} examples")
        models = (("dense", dense), ("pruned", pruned))
        evaluation = {name: evaluate(model, task, rows, progress=progress) for name, model in models}
    if say is not None:
        say("timing")
    report = benchmark(dense, pruned, synthetic_batches(dense, batch_sizes, lengths), progress=progress)
    return Comparison(evaluation, {"dense": parameters(dense), "pruned": parameters(pruned)}, report)
