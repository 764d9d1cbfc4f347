"""Accuracy of the built-in model after pruning and recovery, and after healing; and what healing gains by."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

import secateur
from bench.support.task_examples import TaskExamples, builtin_tasks
from secateur.data import builtin
from secateur.healing.training import Distillation
from secateur.support.environment import environment

TASKS = ("language", "question", "qtype")
FLOPS = (0.2, 0.1, 0.33)
SCORED = 300  # Examples that score the units and choose the plan. All refit and heal.
# Changes to the default settings, each alone.
VARIANTS: dict[str, dict[str, Any]] = {
    "no blocks first": {"blockwise": False},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "states behind blocks, weight 3": {"hidden_weight": 3.0},
    "with dropout": {},
    "15 epochs": {"epochs": 15},
}
VARIED = (("question", 0.2),)


@dataclass(frozen=True)
class Start:
    """A pruned and recovered model of a task."""

    model: nn.Module
    subject: TaskExamples
    flops: float

    @cached_property
    def dense(self) -> float:
        """The dense model's metric."""
        return secateur.evaluate(self.model, self.subject.task, self.subject.test).value

    @cached_property
    def pruned(self) -> nn.Module:
        """The pruned model."""
        task, calibration = self.subject.task, self.subject.calibration
        scores = secateur.attribute(self.model, task, calibration[:SCORED])
        plans = secateur.alternatives(scores, flops=self.flops)
        best, *_ = secateur.choose(self.model, task, plans, calibration[:SCORED], recoveries=("least_squares",))
        pruned = secateur.prune(self.model, best.plan)
        secateur.recover_(self.model, pruned, task, calibration)
        return pruned

    def healed(self, **given: Any) -> dict[str, Any]:
        """Heal, and return the figures."""
        began = time.perf_counter()
        healed = secateur.heal(self.pruned, self.model, self.subject.task, self.subject.calibration, **given)
        seconds = round(time.perf_counter() - began, 1)
        after = secateur.evaluate(healed.model, self.subject.task, self.subject.test)
        before = secateur.evaluate(self.pruned, self.subject.task, self.subject.test)
        return {
            "task": self.subject.name, "metric": after.metric, "flops": self.flops, "dense": self.dense,
            "recovered": before.value, "healed": after.value, "nats_before": healed.before, "nats_after": healed.after,
            "epochs": len(healed.history), "seconds": seconds,
        }  # fmt: skip


@contextmanager
def dropout() -> Iterator[None]:
    """A context in which the pruned model is trained with the dropout of its config."""
    train = Distillation.train
    Distillation.train = nn.Module.train  # type: ignore[method-assign]
    try:
        yield
    finally:
        Distillation.train = train  # type: ignore[method-assign]


def tell(row: dict[str, Any]) -> None:
    """Print a row."""
    print(json.dumps(row), flush=True)


def compare_healing(examples: int = 1000, tested: int = 500, told: Callable[[dict[str, Any]], None] = tell) -> dict[str, Any]:
    """Measure accuracy by task and budget, and by variant.

    Args:
        examples: The calibration examples.
        tested: The test examples.
        told: Receives each row when it is measured.
    """
    torch.set_num_threads(1)
    model, tokenizer = builtin.load()
    subjects = {subject.name: subject for subject in builtin_tasks(tokenizer, examples, tested)}
    rows, variants = list[dict[str, Any]](), list[dict[str, Any]]()
    starts = {(name, flops): Start(model, subjects[name], flops) for flops in FLOPS for name in TASKS}
    for start in starts.values():
        rows.append(start.healed())
        told(rows[-1])
    for cell in VARIED:
        for variant, given in VARIANTS.items():
            with dropout() if variant == "with dropout" else nullcontext():
                variants.append({"variant": variant, **starts[cell].healed(**given)})
            told(variants[-1])
    about = {"examples": examples, "scored": SCORED, "tested": tested}
    return {"environment": environment(model), **about, "rows": rows, "variants": variants}
