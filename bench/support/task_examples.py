"""The built-in tasks with calibration examples and test examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import secateur
from secateur.data import builtin


@dataclass(frozen=True)
class TaskExamples:
    """A built-in task with the examples that score units and the examples that test accuracy."""

    name: str
    task: secateur.TextToText
    calibration: list[dict[str, Any]]
    test: list[dict[str, Any]]


def builtin_tasks(tokenizer: Any, examples: int, tested: int) -> Iterator[TaskExamples]:
    """Yield each built-in task. A task has a closed label set if its calibration examples have at most 32 different targets."""
    for name in builtin.tasks():
        calibration, test = builtin.examples(name)[:examples], builtin.examples(f"{name}.test")[:tested]
        targets = sorted({row["target"] for row in calibration})
        task = secateur.TextToText(tokenizer, labels=targets if len(targets) <= 32 else None)
        yield TaskExamples(name, task, calibration, test)
