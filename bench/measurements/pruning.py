"""The cost of each step of pruning to half of the FLOPs, in forward passes over the calibration examples, and the speed-up."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

import secateur
from bench.subjects import minilm
from secateur.data import builtin
from secateur.flow.choose import alternatives
from secateur.measuring.synthetic import synthetic_batches
from secateur.model.undisturbed import undisturbed
from secateur.support.environment import environment
from secateur.tasks import Task

SHARE, ALIGN, SHAPE = 0.5, 16, (32, 64)
Value = TypeVar("Value")


def pruning(examples: int = 1000) -> dict[str, Any]:
    """Measure the built-in T5 (language) and a fine-tuned BERT classifier (domain) with one thread.

    Times are of this process alone.
    """
    torch.set_num_threads(1)
    model, tokenizer = builtin.load()
    labels = sorted({row["target"] for row in builtin.examples("language")})
    bert, bert_tokenizer = minilm.fine_tuned("domain")
    rows = [
        _steps("builtin-t5", model, secateur.TextToText(tokenizer, labels=labels), builtin.examples("language")[:examples]),
        _steps("minilm", bert, secateur.SequenceClassification(bert_tokenizer), builtin.examples("domain")[:examples]),
    ]
    return {"environment": environment(model), "examples": examples, "flops": SHARE, "align": ALIGN, "rows": rows}


def _steps(name: str, model: nn.Module, task: Task, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Run and time all steps for one model."""
    batches = list(task.batches(task.items(model, examples), torch.device("cpu"), 4096))
    seconds: dict[str, float] = {}

    def timed(step: str, function: Callable[[], Value]) -> Value:
        start = time.process_time()
        value = function()
        seconds[step] = time.process_time() - start
        return value

    def forward() -> None:
        with undisturbed(model), torch.inference_mode():
            for batch in batches:
                task.logits(model, batch)

    forward()
    timed("forward", forward)
    scores = timed("score", lambda: secateur.attribute(model, task, examples))
    plans = timed("plan", lambda: alternatives(scores, flops=SHARE, align=ALIGN))
    best = timed("choose", lambda: secateur.choose(model, task, plans, examples))[0]
    pruned = timed("rebuild", lambda: secateur.prune(model, best.plan))
    few_batches = list(itertools.islice(task.batches(task.items(model, examples[:64]), torch.device("cpu"), 512), 4))
    timed("verify", lambda: secateur.verify(model, pruned, best.plan, task, few_batches))
    if best.recovery is not None:
        method = best.recovery
        timed("recover", lambda: secateur.recover_(model, pruned, task, examples, method=method))
    timed("forward again", forward)
    forward_seconds = (seconds.pop("forward") + seconds.pop("forward again")) / 2
    passes = {step: round(value / forward_seconds, 3) for step, value in seconds.items()}
    size, length = SHAPE
    (timing,) = secateur.benchmark(model, pruned, synthetic_batches(model, [size], [length])).timings
    row = {
        "name": name, "forward_seconds": round(forward_seconds, 3), "passes": passes, "total": round(sum(passes.values()), 2),
        "picked": str(best), "batch": SHAPE, "speedup": round(timing.speedup, 3),
        "quartiles": [round(timing.speedup_low, 3), round(timing.speedup_high, 3)],
        "flops_speedup": round(timing.flops_speedup, 3), "reached": round(timing.speedup / timing.flops_speedup, 3),
    }  # fmt: skip
    print(row, flush=True)
    return row
