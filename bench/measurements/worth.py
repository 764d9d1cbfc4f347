"""The benefit of integrated gradients: accuracy after pruning, compared with gradient x activation, on every built-in task."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch

import secateur
from secateur.attribution.criteria import Criterion, GradientActivation, IntegratedGradients
from secateur.data import builtin
from secateur.support.environment import environment

CRITERIA: dict[str, Criterion] = {
    "gradient x activation": GradientActivation(),
    "IG, path by site": IntegratedGradients(),
    "IG, joint path": IntegratedGradients(path="joint"),
}
STACKS = {"encoder": "encoder", "decoder": "decoder", "both": "encoder,decoder"}
KEEPS = (0.8, 0.6, 0.4, 0.2)
DRAWS = 3


def compare_worth(tasks: Sequence[str] | None = None, examples: int = 48, tested: int = 200) -> dict[str, Any]:
    """Measure accuracy by task, draw of the calibration examples, criterion, pruned stack and rate."""
    torch.set_num_threads(1)
    model, tokenizer = builtin.load()
    rows = []
    for name in tasks or builtin.tasks():
        pool, test = builtin.examples(name), builtin.examples(f"{name}.test")[:tested]
        targets = sorted({row["target"] for row in pool})
        task = secateur.TextToText(tokenizer, labels=targets if len(targets) <= 32 else None)
        dense = secateur.evaluate(model, task, test)
        for draw in range(DRAWS):
            calibration = random.Random(draw).sample(pool, examples)
            for label, criterion in CRITERIA.items():
                start = time.perf_counter()
                scores = secateur.attribute(model, task, calibration, criterion=criterion)
                seconds = time.perf_counter() - start
                row = {"task": name, "metric": dense.metric, "dense": dense.value, "draw": draw, "criterion": label}
                for stack, select in STACKS.items():
                    values = [_accuracy(model, task, test, scores.of(select), keep) for keep in KEEPS]
                    accuracy = dict(zip(map(str, KEEPS), values, strict=True))
                    rows.append({**row, "stack": stack, "seconds": round(seconds, 1), "accuracy": accuracy})
                    print(name, draw, label, stack, [round(value, 3) for value in values], flush=True)
    about = {"examples": examples, "tested": tested, "keeps": KEEPS, "draws": DRAWS}
    return {"environment": environment(model), **about, "rows": rows}


def _accuracy(model: Any, task: secateur.Task, test: Any, scores: secateur.Scores, keep: float) -> float:
    """Prune at this rate and return the accuracy."""
    return secateur.evaluate(secateur.prune(model, secateur.plan(scores, keep=keep)), task, test).value
