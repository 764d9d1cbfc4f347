"""How a model is run fastest on this machine, measured on a sample of the corpus: batch size, threads, dtype."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from secateur.corpus.pipeline import Runner, scored
from secateur.corpus.windows import Window
from secateur.tasks import Item
from secateur.tasks.base import model_device

# Fewer rows than that are scored before a measurement would have paid.
FEWEST = 512
SECONDS = 0.7
# What a setting must gain to be taken, as these measurements are short; and by how much a probability may change by a dtype.
GAIN, TOLERANCE = 1.05, 0.01
TOKENS = {"cpu": (1024, 256, 512, 2048, 4096), "cuda": (16384, 4096, 65536, 131072)}

Say = Callable[[str], None]


def usable_cores() -> int:
    """CPU cores that this process may use, a container's quota counted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        most, _, period = quota.read_text().partition(" ")
        if most != "max":
            cores = min(cores, -(-int(most) // int(period)))
    return max(cores, 1)


def untuned(model: Runner, *, max_tokens: int | None = None, threads: int | None = None) -> Runner:
    """What usually does well. On a CPU each thread runs batches of its own: a batch that all of them share makes them wait for
    each other at each product. threads: of the CPU, all together; None: the usable cores."""
    on_cpu = model_device(model.model).type == "cpu"
    workers = (threads or usable_cores()) if on_cpu else 2  # One prepares its next batch while the device runs the other's.
    return replace(
        model,
        max_tokens=max_tokens or TOKENS["cpu" if on_cpu else "cuda"][0],
        workers=workers,
        threads=1 if on_cpu else threads,
    )


def tuned(
    model: Runner,
    items: Sequence[Item],
    *,
    max_tokens: int | None = None,
    threads: int | None = None,
    any_dtype: bool = False,
    say: Say = lambda line: None,
) -> Runner:
    """The model as it scores the items fastest. max_tokens, threads: given, or None to be measured. any_dtype: bfloat16 is
    tried too on a CPU, and taken if no probability changes by more than TOLERANCE. say: told what was measured."""
    best = untuned(model, max_tokens=max_tokens, threads=threads)
    on_cpu = model_device(model.model).type == "cpu"
    trial = _Trial(best, items)
    speed = trial.speed(best)

    def consider(other: Runner, what: str) -> None:
        nonlocal best, speed
        found = trial.speed(other)
        taken = found > GAIN * speed
        say(f"{what}: {found / speed:.2f}x as fast{', taken' if taken else ''}")
        if taken:
            best, speed = other, found

    if on_cpu and threads is None and best.workers > 1:
        for each in {best.workers, min(best.workers, 4)} - {1}:
            split = replace(best, workers=best.workers // each, threads=each)
            consider(split, f"{split.workers} workers of {each} threads")
    if max_tokens is None:
        for tokens in TOKENS["cpu" if on_cpu else "cuda"][1:]:
            consider(replace(best, max_tokens=tokens), f"batches of {tokens} tokens")
    if any_dtype and on_cpu and next(model.model.parameters()).dtype == torch.float32:
        narrow = replace(best, model=copy.deepcopy(model.model).to(torch.bfloat16))
        change = float(np.abs(trial.probabilities(narrow) - trial.probabilities(best)).max())
        if change <= TOLERANCE:
            consider(narrow, f"bfloat16, probabilities within {change:.4f}")
        else:
            say(f"bfloat16 left out: a probability changes by {change:.4f}")
    return best


class _Trial:
    """Times models on as many of the items as take about SECONDS."""

    def __init__(self, model: Runner, items: Sequence[Item]) -> None:
        self._labels = len(model.task.label_names(model.model))
        shuffled = np.random.default_rng(0).permutation(len(items))
        self._items = [items[k] for k in shuffled]
        self._count = len(self._take(model.max_tokens * model.workers))
        self.speed(model)  # The first pass of a model is slower.
        wanted = int(self.speed(model) * SECONDS)
        self._count = len(self._take(max(wanted, 2 * model.max_tokens * model.workers)))

    def speed(self, model: Runner) -> float:
        """Tokens a second."""
        began = time.perf_counter()
        window = self._run(model, self._items[: self._count])
        return window.tokens / (time.perf_counter() - began)

    def probabilities(self, model: Runner) -> np.ndarray:
        """[items, labels]"""
        found = self._run(model, self._items[: self._count]).scores.astype(np.float64)
        likely = np.exp(found - found.max(1, keepdims=True))
        return np.asarray(likely / likely.sum(1, keepdims=True))

    def _run(self, model: Runner, items: Sequence[Item]) -> Window:
        rows = [replace(item, row=row) for row, item in enumerate(items)]
        scores = np.zeros((len(rows), self._labels), dtype=np.float32)
        (window,) = scored(iter([Window(0, 1.0, [], [None] * len(rows), rows, scores)]), replace(model))
        return window

    def _take(self, tokens: int) -> list[Item]:
        taken: list[Item] = []
        for item in self._items:
            if tokens <= 0:
                break
            taken.append(item)
            tokens -= item.length
        return taken
