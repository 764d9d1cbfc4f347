"""Accuracy after pruning the built-in model, with and without the recovery of what was lost."""

from __future__ import annotations

import time
from typing import Any, get_args

import torch

import secateur
from bench.support.jobs import jobs
from secateur.data import builtin
from secateur.model.sites import AttentionUnit
from secateur.support.environment import environment

KEEPS = (0.7, 0.5, 0.3)


def compare_recovery(examples: int = 300, tested: int = 500) -> dict[str, Any]:
    """By task, unit of attention (channels: as many in each head) and rate; the same examples to score on and to refit on."""
    torch.set_num_threads(1)
    model, tokenizer = builtin.load()
    rows = []
    for job in jobs(tokenizer, examples, tested):
        name, task, calibration, test = job.name, job.task, job.calibration, job.test
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
                    "flops": plan.summary()["remaining"]["flops"], "seconds": round(time.perf_counter() - start, 2),
                    "plain": plain, "recovered": secateur.evaluate(pruned, task, test).value,
                    "before": sum(refit.before for refit in refits) / len(refits),
                    "after": sum(refit.after for refit in refits) / len(refits),
                }  # fmt: skip
                rows.append(row)
                print(row, flush=True)
    return {"environment": environment(model), "examples": examples, "tested": tested, "keeps": KEEPS, "rows": rows}
