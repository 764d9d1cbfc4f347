"""Accuracy of the built-in model after pruning and recovery, and after healing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

import secateur
from bench.measurements.budgets import Draw, best_candidate
from bench.support.task_examples import TaskExamples, builtin_tasks
from secateur.data import builtin
from secateur.support.environment import environment

TASKS = ("language", "question", "qtype")
FLOPS = (0.2, 0.1, 0.33)
SCORED = 300  # Examples that score the units and choose the plan. All refit and heal.


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
        """The model that `secateur prune` makes, refitted on all examples."""
        task, calibration = self.subject.task, self.subject.calibration
        best = best_candidate(Draw(self.model, task, calibration[:SCORED], 0), self.flops)
        pruned = secateur.prune(self.model, best.plan)
        secateur.recover_(self.model, pruned, task, calibration, method=best.recovery or "least_squares")
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


def tell(row: dict[str, Any]) -> None:
    """Print a row."""
    print(json.dumps(row), flush=True)


def compare_healing(examples: int = 1000, tested: int = 500, told: Callable[[dict[str, Any]], None] = tell) -> dict[str, Any]:
    """Measure accuracy by task and budget.

    Args:
        examples: The calibration examples.
        tested: The test examples.
        told: Receives each row when it is measured.
    """
    torch.set_num_threads(1)
    model, tokenizer = builtin.load()
    subjects = {subject.name: subject for subject in builtin_tasks(tokenizer, examples, tested)}
    rows = list[dict[str, Any]]()
    for flops in FLOPS:
        for name in TASKS:
            rows.append(Start(model, subjects[name], flops).healed())
            told(rows[-1])
    about = {"examples": examples, "scored": SCORED, "tested": tested}
    return {"environment": environment(model), **about, "rows": rows}
