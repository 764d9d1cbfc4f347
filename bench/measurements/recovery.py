"""Accuracy after pruning the built-in model, with and without recovery."""

from __future__ import annotations

import time
from typing import Any, get_args

import torch

import secateur
from bench.support.task_examples import builtin_tasks
from secateur.data import builtin
from secateur.model.sites import AttentionUnit
from secateur.support.environment import environment

KEEPS = (0.7, 0.5, 0.3)


def compare_recovery(examples: int = 300, tested: int = 500) -> dict[str, Any]:
    """Measure accuracy by task, unit of attention and rate.

    Channels are pruned with equal counts in all heads. The same examples score the units and refit the pruned model.
    """
    torch.set_num_threads(1)
    model, tokenizer = builtin.load()
    rows = []
    for subject in builtin_tasks(tokenizer, examples, tested):
        name, task, calibration, test = subject.name, subject.task, subject.calibration, subject.test
        dense = secateur.evaluate(model, task, test)
        for unit in get_args(AttentionUnit):
            scores = secateur.attribute(model, task, calibration, unit=unit)
            for keep in KEEPS:
                plan = secateur.plan(scores, keep=keep, per_head=unit == "channel")
                pruned = secateur.prune(model, plan)
                plain = secateur.evaluate(pruned, task, test).value
                start = time.perf_counter()
                refits = secateur.recover_(model, pruned, task, calibration)
                row = {
                    "task": name, "metric": dense.metric, "dense": dense.value, "unit": unit, "keep": keep,
                    "flops": plan.budget_json()["remaining"]["flops"], "seconds": round(time.perf_counter() - start, 2),
                    "plain": plain, "recovered": secateur.evaluate(pruned, task, test).value,
                    "before": sum(refit.before for refit in refits) / len(refits),
                    "after": sum(refit.after for refit in refits) / len(refits),
                }  # fmt: skip
                rows.append(row)
                print(row, flush=True)
    return {"environment": environment(model), "examples": examples, "tested": tested, "keeps": KEEPS, "rows": rows}
