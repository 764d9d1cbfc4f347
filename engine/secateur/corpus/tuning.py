"""How a model is run fastest on this machine, measured on a sample of the corpus: batch size, threads, dtype, compilation."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from secateur.corpus.compiling import MODES, CompileError
from secateur.corpus.pipeline import Runner, scored
from secateur.corpus.windows import Window
from secateur.tasks import Item
from secateur.tasks.batches import model_device

# Fewer rows than that are scored before a measurement would have paid.
FEWEST = 512
SECONDS = 0.7
# What a setting must gain to be taken, as these measurements are short; and by how much a probability may change by a dtype.
GAIN, TOLERANCE = 1.05, 0.01
# Seconds that scoring must take without compilation for it to be tried: that takes a minute or two, which a gain of a tenth and
# more then gives back.
WORTH = 1800
TOKENS = {"cpu": (1024, 256, 512, 2048, 4096), "cuda": (16384, 4096, 65536, 131072)}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """Items of a corpus, and about how many tokens that has in all; None: unknown."""

    items: Sequence[Item]
    of: float | None = None


def usable_cores() -> int:
    """CPU cores that this process may use, a container's quota counted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        most, _, period = quota.read_text().partition(" ")
        if most != "max":
            cores = min(cores, -(-int(most) // int(period)))
    return max(cores, 1)


def untuned(runner: Runner, *, max_tokens: int | None = None, threads: int | None = None) -> Runner:
    """What usually does well. On a CPU each thread runs batches of its own: a batch that all of them share makes them wait for
    each other at each product. threads: of the CPU, all together; None: the usable cores."""
    on_cpu = model_device(runner.model).type == "cpu"
    workers = (threads or usable_cores()) if on_cpu else 2  # One prepares its next batch while the device runs the other's.
    return replace(
        runner,
        max_tokens=max_tokens or TOKENS["cpu" if on_cpu else "cuda"][0],
        workers=workers,
        threads=1 if on_cpu else threads,
    )


def tuned(
    runner: Runner,
    sample: Sample,
    *,
    max_tokens: int | None = None,
    threads: int | None = None,
    any_dtype: bool = False,
    compile: bool | None = False,
    say: Say = lambda line: None,
) -> Runner:
    """How the runner's model scores the sample fastest. max_tokens, threads: given, or None to be measured. any_dtype: bfloat16
    is tried too on a CPU, and taken if no probability changes by more than TOLERANCE. compile: True: the model is compiled, in
    the fastest mode; None: if the corpus is long enough for compilation to be tried, and it is faster. say: told what was
    measured. Raises InputError: compile is True, and the model cannot be compiled within TOLERANCE."""
    best = untuned(runner, max_tokens=max_tokens, threads=threads)
    on_cpu = model_device(runner.model).type == "cpu"
    trial = _Trial(best, sample.items)
    speed = trial.speed(best)

    def consider(other: Runner, what: str, *, anyway: bool = False) -> None:
        nonlocal best, speed
        found = trial.speed(other)
        taken = anyway or found > GAIN * speed
        say(f"{what}: {found / speed:.2f}x as fast{', taken' if taken else ''}")
        if taken:
            best, speed = other, found

    # Before threads and batches, of which others may be best in another dtype.
    if any_dtype and on_cpu and next(runner.model.parameters()).dtype == torch.float32:
        narrow = replace(best, model=copy.deepcopy(runner.model).to(torch.bfloat16))
        change = trial.change(best, narrow)
        if change <= TOLERANCE:
            consider(narrow, f"bfloat16, probabilities within {change:.4f}")
        else:
            say(f"bfloat16 left out: a probability changes by {change:.4f}")
    if on_cpu and threads is None and best.workers > 1:
        for each in {best.workers, min(best.workers, 4)} - {1}:
            split = replace(best, workers=best.workers // each, threads=each)
            consider(split, f"{split.workers} workers of {each} threads")
    if max_tokens is None:
        for tokens in TOKENS["cpu" if on_cpu else "cuda"][1:]:
            consider(replace(best, max_tokens=tokens), f"batches of {tokens} tokens")
    if compile is None and (why := _too_short(sample, speed)):
        say(f"compilation left out: {why}")
    elif compile is not False:
        plain = best
        for mode in MODES["cpu" if on_cpu else "cuda"]:
            other, began = replace(plain, compiled=mode), time.perf_counter()
            asked = compile is True and best.compiled is None
            try:
                change = trial.change(plain, other)
                if change > TOLERANCE:
                    raise CompileError(f"compile: expected probabilities within {TOLERANCE}, got a change by {change:.4f}")
            except CompileError as error:
                if asked:
                    raise
                say(f"{mode} compilation left out: {str(error).removeprefix('compile: ')}")
            else:
                seconds = time.perf_counter() - began
                consider(other, f"compiled ({mode}) in {seconds:.0f} s, probabilities within {change:.0e}", anyway=asked)
    return best


def _too_short(sample: Sample, speed: float) -> str | None:
    """Why compilation would not pay, at so many tokens a second without it."""
    if sample.of is None:
        return "how long the corpus is cannot be told"
    seconds = sample.of / speed
    if seconds >= WORTH:
        return None
    return f"scoring takes about {seconds / 60:.1f} minutes without it, and it pays from {WORTH // 60} on"


class _Trial:
    """Times runners on as many of the items as take about SECONDS."""

    def __init__(self, runner: Runner, items: Sequence[Item]) -> None:
        self._labels = len(runner.task.label_names(runner.model))
        shuffled = np.random.default_rng(0).permutation(len(items))
        self._items = [items[k] for k in shuffled]
        self._count = len(self._take(runner.max_tokens * runner.workers))
        self.speed(runner)  # The first pass of a model is slower.
        wanted = int(self.speed(runner) * SECONDS)
        self._count = len(self._take(max(wanted, 2 * runner.max_tokens * runner.workers)))

    def speed(self, runner: Runner) -> float:
        """Tokens a second, from when the runner is ready to score."""
        window, seconds = self._run(runner)
        return window.tokens / seconds

    def change(self, runner: Runner, other: Runner) -> float:
        """The most that a probability of one differs from the other's."""
        first, second = (self._run(each)[0].probabilities() for each in (runner, other))
        return float(np.abs(first - second).max())

    def _run(self, runner: Runner) -> tuple[Window, float]:
        rows = [replace(item, row=row) for row, item in enumerate(self._items[: self._count])]
        scores = np.zeros((len(rows), self._labels), dtype=np.float32)
        began = 0.0

        def events() -> Iterator[Window]:
            nonlocal began
            began = time.perf_counter()
            yield Window(0, 1.0, [], [None] * len(rows), rows, scores)

        (window,) = scored(events(), replace(runner))
        return window, time.perf_counter() - began

    def _take(self, tokens: int) -> list[Item]:
        taken: list[Item] = []
        for item in self._items:
            if tokens <= 0:
                break
            taken.append(item)
            tokens -= item.length
        return taken
