"""compare: evaluate and time a dense model and its pruned one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.data.examples import Examples, read_examples
from secateur.measuring.benchmark import Report, benchmark
from secateur.measuring.evaluate import evaluate
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.cost import parameters
from secateur.tasks import Evaluation, Task


@dataclass(frozen=True)
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

    Returns:
        The evaluations, the sizes and the timings.

    Raises:
        InputError: As `evaluate` and `benchmark` do.
    """
    evaluation = {}
    if examples is not None:
        rows = read_examples(examples, task.columns)
        if say is not None:
            say(f"evaluating on {len(rows)} examples")
        evaluation = {name: evaluate(model, task, rows) for name, model in (("dense", dense), ("pruned", pruned))}
    if say is not None:
        say("timing")
    report = benchmark(dense, pruned, synthetic_batches(dense, batch_sizes, lengths))
    return Comparison(evaluation, {"dense": parameters(dense), "pruned": parameters(pruned)}, report)
