"""Progress of the commands on stderr: a bar on a terminal, elsewhere and in the file of --log a line every 30 seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.cli.shared.tell import note, say, wanted
from secateur.support.progress import Bars, Report

EVERY = 30.0  # Seconds between two lines.
stderr = Console(stderr=True)


class bars(Bars):
    """Shows a bar for each stage of a call. A line is written when a step ends 30 seconds or more after the line before it.

    Args:
        amount: Returns what is done, in words, from (done, total, seconds). By default it counts steps and tells their rate.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, amount: Callable[[int, int, float], str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._amount, self._clock = amount, clock

    @contextmanager
    def open(self, what: str) -> Iterator[Report]:
        on_terminal = stderr.is_terminal and not wanted.quiet
        write = note if on_terminal else say
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        first, line_at, lines = (0, 0.0), 0.0, 0

        def report(done: int, total: int) -> None:
            nonlocal first, line_at, lines
            now = self._clock()
            if not bar.tasks:
                # A call that continues earlier work begins with some steps done, which do not count for the rate.
                first, line_at = (done, now), now
                bar.add_task(what, total=total or None, completed=done, amount="")
            (task,) = bar.tasks
            seconds = now - first[1]
            amount = self._amount(done, total, seconds) if self._amount else _counted(done, total, done - first[0], seconds)
            # `advance` also gives the rate its first sample, so that the first step gives an estimate.
            bar.advance(task.id, done - task.completed)
            bar.update(task.id, amount=amount)
            if now - line_at >= EVERY or (lines and done == total):
                line_at, lines = now, lines + 1
                write(f"{what}: {amount}{_left(done, total, first[0], seconds)}")

        # The rate is averaged over the whole run. Over the default 30 seconds, slower steps would never give one.
        with Progress(
            *columns, console=stderr, transient=True, disable=not on_terminal, speed_estimate_period=math.inf,
            get_time=self._clock,
        ) as bar:  # fmt: skip
            yield report


def _counted(done: int, total: int, new: int, seconds: float) -> str:
    """The steps done, all steps, and the rate of the steps that this call has done."""
    rate = new / seconds if seconds > 0 else 0.0
    pace = f", {rate:,.1f}/s" if rate >= 1 else f", {60 * rate:,.1f}/min" if rate else ""
    return f"{done:,} of {total:,}{pace}"


def _left(done: int, total: int, began: int, seconds: float) -> str:
    """The time left, or at the end the time taken. Nothing where no step is done yet, or the total is unknown."""
    if done == total:
        return f", in {timedelta(seconds=round(seconds))}"
    if done <= began or not total:
        return ""
    return f", {timedelta(seconds=round(seconds * (total - done) / (done - began)))} left"
