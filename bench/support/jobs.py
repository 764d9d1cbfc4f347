"""The built-in tasks, each with examples to score on and others to test on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import secateur
from secateur.data import builtin


@dataclass(frozen=True)
class Job:
    name: str
    task: secateur.TextToText
    calibration: list[dict[str, Any]]
    test: list[dict[str, Any]]


def jobs(tokenizer: Any, examples: int, tested: int) -> Iterator[Job]:
    """A task is closed where its examples have few targets."""
    for name in builtin.tasks():
        calibration, test = builtin.examples(name)[:examples], builtin.examples(f"{name}.test")[:tested]
        targets = sorted({row["target"] for row in calibration})
        yield Job(name, secateur.TextToText(tokenizer, labels=targets if len(targets) <= 32 else None), calibration, test)
