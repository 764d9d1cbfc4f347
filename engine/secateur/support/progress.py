"""Progress of long calls: tqdm's bar, a function that the caller gives, or the bars of the command line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from secateur.support.errors import InputError
from secateur.support.fields import shown

T = TypeVar("T")
Report = Callable[[int, int], object]  # Receives the steps done and all steps.


# What `watched` calls with the size of each finished step; None outside `watching`.
_DONE: ContextVar[Callable[[int], object] | None] = ContextVar("_DONE", default=None)


class Bars(ABC):
    """Shows a bar for each stage of a call."""

    @abstractmethod
    def open(self, what: str) -> AbstractContextManager[Report]:
        """Return a context that provides a stage's function of (done, total). Its first call starts the clock.

        Args:
            what: A word for the stage.
        """


Progress = bool | Report | Bars


class _TqdmBars(Bars):
    """Bars of tqdm, which are widgets in a notebook."""

    @contextmanager
    def open(self, what: str) -> Iterator[Report]:
        from tqdm.auto import tqdm

        bars: list[Any] = []

        def report(done: int, total: int) -> None:
            if not bars:
                bars.append(tqdm(desc=what, total=total, initial=done))
            bars[0].update(done - bars[0].n)

        try:
            yield report
        finally:
            for bar in bars:
                bar.close()


def require_progress(progress: Progress | None) -> None:
    """Check an argument `progress`.

    Args:
        progress: True for a bar of tqdm, None or False for nothing, or a function of (done, total).

    Raises:
        InputError: The value is something else.
    """
    if not (progress is None or isinstance(progress, (bool, Bars)) or callable(progress)):
        raise InputError(f"progress: expected True, False or a function of (done, total), got {shown(progress)}")


@contextmanager
def reporting(progress: Progress | None, what: str) -> Iterator[Report]:
    """Provide the function of (done, total) of one stage.

    Args:
        progress: The argument of the call, as in `require_progress`.
        what: A word for the stage, which stands beside its bar.

    Raises:
        InputError: As `require_progress` does.
    """
    require_progress(progress)
    if isinstance(progress, bool) or progress is None:
        progress = _TqdmBars() if progress else _silent
    if isinstance(progress, Bars):
        with progress.open(what) as report:
            yield report
    else:
        yield progress


def counted(
    progress: Progress | None, what: str, steps: Iterable[T], total: int, size: Callable[[T], int] = lambda step: 1
) -> Generator[T, None, None]:
    """Yield the steps, and report how many are done: 0 before the first one, and then after each.

    Args:
        progress: The argument of the call, as in `require_progress`.
        what: A word for the stage.
        steps: The steps.
        total: The sum of their sizes.
        size: Returns what a step counts for.
    """
    with reporting(progress, what) as report:
        done = 0
        report(done, total)
        for step in steps:
            yield step
            done += size(step)
            report(done, total)


@contextmanager
def watching(progress: Progress | None, what: str, total: int) -> Iterator[None]:
    """A context that reports the steps of `watched` loops inside it: 0 at its beginning, and `total` at its end.

    The loops belong to tasks, whose methods anyone may override, so their signatures do not have the argument `progress`.

    Args:
        progress: The argument of the call, as in `require_progress`.
        what: A word for the stage.
        total: The sum of the sizes of all steps.

    Raises:
        InputError: As `require_progress` does.
    """
    with reporting(progress, what) as report:
        done = 0
        report(done, total)

        def add(size: int) -> None:
            nonlocal done
            if size and done < total:
                done = min(done + size, total)
                report(done, total)

        token = _DONE.set(add)
        try:
            yield
        finally:
            _DONE.reset(token)
        add(total - done)  # A task that makes its batches by itself watches no loop.


def watched(steps: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
    """Yield the steps, and report to `watching`, if it surrounds the loop, that they are done.

    Args:
        steps: The steps.
        size: Returns what a step counts for.
    """
    add = _DONE.get()
    for step in steps:
        yield step
        if add is not None:
            add(size(step))


def _silent(done: int, total: int) -> None:
    """Show nothing."""
