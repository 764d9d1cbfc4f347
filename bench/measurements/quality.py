"""Accuracy after pruning the built-in model for the settings of gradient x activation. It decides the default setting."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

import secateur
from bench.support.task_examples import builtin_tasks
from secateur.attribution.criteria import GradientActivation
from secateur.data import builtin
from secateur.support.environment import environment

SETTINGS: dict[str, GradientActivation] = {
    "probability, signed (the paper's)": GradientActivation.paper(),
    "probability, absolute": GradientActivation(target="probability"),
    "log-probability, absolute": GradientActivation(),
    "log-probability, squared": GradientActivation(over_examples="squared"),
    "margin, absolute": GradientActivation(target="margin"),
    "unsupervised (the paper's)": GradientActivation.paper_unsupervised(),
}
KEEPS = (0.7, 0.5, 0.3)
UNITS = {"heads and neurons": ("head", None), "neurons alone": ("head", "ffn")}


def compare_criteria(examples: int = 300, tested: int = 500) -> dict[str, Any]:
    """Measure accuracy by task, units, setting and rate. 300 examples score the units, and 500 test the accuracy."""
    torch.set_num_threads(1)
    model, tokenizer = builtin.load()
    rows = []
    for subject in builtin_tasks(tokenizer, examples, tested):
        name, task, calibration, test = subject.name, subject.task, subject.calibration, subject.test
        majority = max(Counter(row["target"] for row in test).values()) / len(test)
        dense = secateur.evaluate(model, task, test)
        for units, (unit, select) in UNITS.items():
            for setting, criterion in SETTINGS.items():
                if task.labels is None and criterion.labels == "all":
                    continue
                scores = secateur.attribute(model, task, calibration, criterion=criterion, unit=unit, select=select)  # type: ignore[arg-type]
                values = []
                for keep in KEEPS:
                    pruned = secateur.prune(model, secateur.plan(scores, keep=keep))
                    values.append(secateur.evaluate(pruned, task, test).value)
                row = {"task": name, "metric": dense.metric, "dense": dense.value, "majority": majority}
                rows.append(
                    {**row, "units": units, "setting": setting, "accuracy": dict(zip(map(str, KEEPS), values, strict=True))}
                )
                print(name, units, setting, [round(value, 3) for value in values], flush=True)
    about = {"examples": examples, "tested": tested, "keeps": KEEPS}
    return {"environment": environment(model), **about, "rows": rows}


if __name__ == "__main__":
    compare_criteria()
