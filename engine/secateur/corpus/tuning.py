"""Measure on a sample of the corpus how the model runs fastest here: batch size, threads, dtype, runtime, compilation."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from secateur.corpus.compiling import MODES, CompileError
from secateur.corpus.pipeline import Runner, scored
from secateur.corpus.sources import Row
from secateur.corpus.windows import Window
from secateur.model.offloading import copy_of
from secateur.support.environment import require_threads
from secateur.support.errors import InputError
from secateur.tasks import Item
from secateur.tasks.batches import model_device

# A corpus with fewer rows is scored in less time than a measurement would save.
FEWEST = 512
SECONDS = 0.7
# The speed-up that a setting must reach to be taken, as these measurements are short; and the change of a probability that
# another dtype, runtime or compilation may cause. Another runtime must gain more, as it is another package to trust.
GAIN, RUNTIME_GAIN, TOLERANCE = 1.05, 1.1, 0.01
RUNTIMES = ("auto", "torch", "openvino")
# Compilation is tried only if scoring takes so many seconds without it. Trying takes a minute or two, which a speed-up of a
# tenth or more then saves.
WORTH = 1800
# OpenVINO is tried only if scoring takes so many seconds without it. The export takes up to half a minute.
RUNTIME_WORTH = 300
TOKENS = {"cpu": (1024, 256, 512, 2048, 4096), "cuda": (16384, 4096, 65536, 131072)}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """A sample of a corpus.

    Attributes:
        items: Some of its items.
        rows: The rows that the items came from, and those that were rejected.
        corpus_rows: About how many rows are to be scored; None means unknown.
        corpus_tokens: About how many tokens these have; None means unknown.
    """

    items: Sequence[Item]
    rows: Sequence[Row] = ()
    corpus_rows: float | None = None
    corpus_tokens: float | None = None


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use; a container's quota limits it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text().partition(" ")
        if limit != "max":
            cores = min(cores, -(-int(limit) // int(period)))
    return max(cores, 1)


def untuned(runner: Runner, *, max_tokens: int | None = None, threads: int | None = None) -> Runner:
    """Return the runner with settings that usually do well.

    On a CPU each thread runs its own batches. Threads that share a batch would wait for each other at each matrix product.

    Args:
        runner: The model.
        max_tokens: Padded input tokens in a batch; None means the default of the device.
        threads: CPU threads, all together; None means the usable cores.
    """
    on_cpu = model_device(runner.model).type == "cpu"
    if threads is not None:
        require_threads(threads)
    workers = (threads or usable_cores()) if on_cpu else 2  # One worker prepares a batch while the device runs the other's.
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
    runtime: str = "torch",
    say: Say = lambda line: None,
) -> Runner:
    """Return the runner with the settings that score the sample fastest.

    Args:
        runner: The model.
        sample: A sample of the corpus.
        max_tokens: Padded input tokens in a batch; None means that they are measured.
        threads: CPU threads; None means that they are measured.
        any_dtype: On a CPU, also try bfloat16. It is taken if no probability changes by more than TOLERANCE.
        compile: If true, compile the model, in the fastest mode. If None, try compilation if the corpus is long enough, and
            take it if it is faster.
        runtime: "torch", "openvino", or "auto": OpenVINO is taken if it takes the model, scoring would last RUNTIME_WORTH
            without it, it is faster by RUNTIME_GAIN, and changes no probability by more than TOLERANCE.
        say: Called with a line about each measurement.

    Raises:
        InputError: `compile` is true, and the model cannot be compiled within TOLERANCE. `runtime` is "openvino", which cannot
            take the model within TOLERANCE.
    """
    search = _Search(untuned(runner, max_tokens=max_tokens, threads=threads), sample, say)
    on_cpu = model_device(runner.model).type == "cpu"
    # The dtype comes before threads and batches, whose best settings may depend on it.
    if any_dtype and on_cpu and next(runner.model.parameters()).dtype == torch.float32:
        search.try_bfloat16()
    if runtime == "auto" and (why := _too_short(sample, search.speed, RUNTIME_WORTH)):
        say(f"openvino left out: {why}")
    elif runtime != "torch":
        search.try_openvino(required=runtime == "openvino")
    if on_cpu and threads is None and search.best.workers > 1:
        search.try_threads()
    if max_tokens is None:
        for tokens in TOKENS["cpu" if on_cpu else "cuda"][1:]:
            search.consider(replace(search.best, max_tokens=tokens), f"batches of {tokens} tokens")
    if runtime == "openvino":
        compile = False  # It compiles the model itself.
    if compile is None and (why := _too_short(sample, search.speed, WORTH)):
        say(f"compilation left out: {why}")
    elif compile is not False:
        search.try_compilation(MODES["cpu" if on_cpu else "cuda"], required=compile is True)
    return search.best


def rows_a_second(runner: Runner, sample: Sample) -> float:
    """Return how many rows of a sample, which has some, a runner scores in a second, without compiled code."""
    plain = replace(runner, compiled=None)
    speed = _Trial(plain, sample.items).speed(plain)
    return speed * len(sample.items) / sum(item.length for item in sample.items)


class _Search:
    """Tries settings one after the other. `best` is the fastest runner so far, and `speed` its tokens a second."""

    def __init__(self, runner: Runner, sample: Sample, say: Say) -> None:
        self.best, self._say = runner, say
        self._trial = _Trial(runner, sample.items)
        self.speed = self._trial.speed(runner)

    def consider(self, other: Runner, description: str, *, gain: float = GAIN, anyway: bool = False) -> None:
        """Take another runner if it is faster by `gain`, or anyway."""
        speed = self._trial.speed(other)
        taken = anyway or speed > gain * self.speed
        self._say(f"{description}: {speed / self.speed:.2f}x as fast{', taken' if taken else ''}")
        if taken:
            self.best, self.speed = other, speed

    def try_bfloat16(self) -> None:
        """Consider bfloat16, unless it changes a probability by more than TOLERANCE."""
        narrow = replace(self.best, model=copy_of(self.best.model).to(torch.bfloat16))
        change = self._trial.change(self.best, narrow)
        if change <= TOLERANCE:
            self.consider(narrow, f"bfloat16, probabilities within {change:.4f}")
        else:
            self._say(f"bfloat16 left out: a probability changes by {change:.4f}")

    def try_openvino(self, *, required: bool) -> None:
        """Consider OpenVINO in the same dtype. If it is required, it is taken anyway, and its error raised."""
        other = replace(self.best, runtime="openvino")
        try:
            change = self._trial.change(self.best, other)
            if change > TOLERANCE:
                raise InputError(
                    f"engine-runtime: expected probabilities of openvino within {TOLERANCE}, got a change by {change:.4f}"
                )
        except InputError as error:
            if required:
                raise
            self._say(f"openvino left out: {str(error).removeprefix('engine-runtime: ')}")
        else:
            self.consider(other, f"openvino, probabilities within {change:.0e}", gain=RUNTIME_GAIN, anyway=required)

    def try_threads(self) -> None:
        """Consider fewer workers, with several threads each."""
        for threads in {self.best.workers, min(self.best.workers, 4)} - {1}:
            split = replace(self.best, workers=self.best.workers // threads, threads=threads)
            self.consider(split, f"{split.workers} worker{'s' * (split.workers > 1)} of {threads} threads")

    def try_compilation(self, modes: Sequence[str], *, required: bool) -> None:
        """Consider modes of torch.compile. If compilation is required, the first mode is taken anyway, and its error raised."""
        plain = replace(self.best, runtime="torch")
        for mode in modes:
            other, began = replace(plain, compiled=mode), time.perf_counter()
            first = required and self.best.compiled is None
            try:
                change = self._trial.change(plain, other)
                if change > TOLERANCE:
                    raise CompileError(f"compile: expected probabilities within {TOLERANCE}, got a change by {change:.4f}")
            except CompileError as error:
                if first:
                    raise
                self._say(f"{mode} compilation left out: {str(error).removeprefix('compile: ')}")
            else:
                seconds = time.perf_counter() - began
                description = f"compiled ({mode}) in {seconds:.0f} s, probabilities within {change:.0e}"
                self.consider(other, description, anyway=first)


def _too_short(sample: Sample, speed: float, worth: float) -> str | None:
    """Why another way does not pay, from the tokens a second and the `worth` in seconds without it; None if it does."""
    if sample.corpus_tokens is None:
        return "the length of the corpus is unknown"
    seconds = sample.corpus_tokens / speed
    if seconds >= worth:
        return None
    return f"scoring takes about {seconds / 60:.1f} minutes without it, and it pays from {worth / 60:g} minutes on"


class _Trial:
    """Times runners on a random part of the items that takes about SECONDS."""

    def __init__(self, runner: Runner, items: Sequence[Item]) -> None:
        self._labels, self._kind = len(runner.task.label_names(runner.model)), runner.task.output_kind(runner.model)
        shuffled = np.random.default_rng(0).permutation(len(items))
        self._items = [items[k] for k in shuffled]
        self._count = len(self._take(runner.max_tokens * runner.workers))
        self.speed(runner)  # The first pass of a model is slower, and is not used.
        tokens = int(self.speed(runner) * SECONDS)
        self._count = len(self._take(max(tokens, 2 * runner.max_tokens * runner.workers)))

    def speed(self, runner: Runner) -> float:
        """Return the tokens a second, from the moment when the runner is ready to score."""
        window, seconds = self._run(runner)
        return window.tokens / seconds

    def change(self, runner: Runner, other: Runner) -> float:
        """Return the largest difference between the probabilities of two runners, inf where only one rejects a row.

        Differences of values are shares of their standard deviation.
        """
        windows = [self._run(tried)[0] for tried in (runner, other)]
        if windows[0].reasons != windows[1].reasons:
            return math.inf
        scored = [reason is None for reason in windows[0].reasons]
        first, second = (window.probabilities()[scored] for window in windows)
        scale = float(first.std()) if self._kind == "value" and len(first) > 1 else 1.0
        return float(np.abs(first - second).max(initial=0.0)) / (scale or 1.0)

    def _run(self, runner: Runner) -> tuple[Window, float]:
        """Score the items; return their window, and the seconds that it took."""
        rows = [replace(item, row=row) for row, item in enumerate(self._items[: self._count])]
        scores = np.zeros((len(rows), self._labels), dtype=np.float32)  # [items, labels]
        began = 0.0

        def events() -> Iterator[Window]:
            nonlocal began
            began = time.perf_counter()
            yield Window(0, 1.0, [], [None] * len(rows), rows, scores, kind=self._kind)

        (window,) = scored(events(), replace(runner))
        return window, time.perf_counter() - began

    def _take(self, tokens: int) -> list[Item]:
        """The first items that have so many tokens together."""
        taken: list[Item] = []
        for item in self._items:
            if tokens <= 0:
                break
            taken.append(item)
            tokens -= item.length
        return taken
