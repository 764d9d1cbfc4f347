"""The model at work while shards are read and written: threads with bounded queues between them, results in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from secateur.corpus.compiling import LabelScores, compiled
from secateur.corpus.shapes import longest, stepped
from secateur.corpus.windows import Window
from secateur.tasks import Item, TextTask
from secateur.tasks.batches import Batch, buckets, model_device

T = TypeVar("T")
# Windows that are read ahead of the one that is being scored, and batches ahead of each worker.
WINDOWS, BATCHES = 2, 2


@dataclass
class Runner:
    """A model with its task and how it is run. max_tokens: padded input tokens in a batch; halved for good when memory runs
    out. workers: threads that run batches, of `threads` CPU threads each (None: torch's own number). compiled: a mode of
    torch.compile; None: not compiled. busy: seconds that they spent in the model, all together."""

    model: nn.Module
    task: TextTask
    max_tokens: int
    workers: int = 1
    threads: int | None = None
    compiled: str | None = None
    busy: float = 0.0
    halvings: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _label_scores: LabelScores | None = field(default=None, init=False)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Within it batches are scored as `compiled` says. Raises CompileError, an InputError."""
        if self.compiled is None:
            yield
            return
        try:
            with compiled(self.task, self.model, self.compiled, self.threads) as self._label_scores:
                yield
        finally:
            self._label_scores = None

    def batches(self, window: Window) -> list[list[Item]]:
        """A window's items in batches, each within max_tokens when padded (one item at least)."""
        return buckets(window.items, self.max_tokens, self.padded)

    def padded(self, length: int) -> int:
        """What a batch is padded to whose longest input has that length. Where oneDNN multiplies (reduced precision on a CPU,
        and what is compiled), lengths are few."""
        return min(stepped(length), max(self._most, length)) if self._few_lengths else length

    @cached_property
    def _few_lengths(self) -> bool:
        parameter = next(self.model.parameters())
        return parameter.device.type == "cpu" and (self.compiled is not None or parameter.dtype.itemsize < 4)

    @cached_property  # Asked for each item.
    def _most(self) -> int:
        return longest(self.task, self.model)

    def label_scores(self, batch: Batch) -> Tensor:
        """The task's, as `compiled` says within `compiling`."""
        return (self._label_scores or self.task.label_scores)(self.model, batch)

    def score(self, window: Window, items: Sequence[Item]) -> None:
        """Scores a batch of a window's items. One that does not fit into memory is split; an item that does not fit alone is
        rejected."""
        length = self.padded(items[0].length)
        if len(items) * length > self.max_tokens and len(items) > 1:
            self._halves(window, items)
            return
        began = time.perf_counter()
        try:
            batch = self.task.collate_inputs(items, model_device(self.model), length)
            scores = self.label_scores(batch).cpu()
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        else:
            with self._lock:
                self.busy += time.perf_counter() - began
            window.fill(items, scores, len(items) * length)
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(items) == 1:
            window.reject(items[0], f"out of memory: {items[0].length} tokens alone")
            return
        with self._lock:
            self.max_tokens = min(self.max_tokens, len(items) * length // 2)
            self.halvings += 1
        self._halves(window, items)

    def _halves(self, window: Window, items: Sequence[Item]) -> None:
        middle = len(items) // 2
        self.score(window, items[:middle])
        self.score(window, items[middle:])


def scored(events: Iterator[T], runner: Runner) -> Iterator[T]:
    """The same events in the same order, each window once it is scored.

    `events` is iterated in a thread of its own, which reads and encodes ahead; the batches go to the runner's workers. What
    any of them raises is raised here. Leaving early stops them.
    """
    waiting: _Channel[T] = _Channel(WINDOWS)
    batches: _Channel[tuple[Window, list[Item]]] = _Channel(BATCHES * runner.workers)
    failed: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            work()
        except _Closed:
            pass
        except BaseException as error:
            failed.append(error)
            waiting.close()
            batches.close()

    def feed() -> None:
        for event in events:
            waiting.put(event)
            if isinstance(event, Window):
                for items in runner.batches(event):
                    batches.put((event, items))
        waiting.end()
        batches.end()

    def run() -> None:
        if runner.threads is not None:
            torch.set_num_threads(runner.threads)
        with torch.inference_mode():
            while (next_one := batches.get()) is not None:
                runner.score(*next_one)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in (feed, *[run] * runner.workers)]
    with runner.task.scoring(runner.model), runner.compiling():
        for thread in threads:
            thread.start()
        try:
            while (event := waiting.get()) is not None:
                if isinstance(event, Window):
                    while not event.done.wait(0.5):
                        if failed:
                            raise failed[0]
                yield event
        except _Closed:
            raise failed[0] from None
        finally:
            waiting.close()
            batches.close()
            for thread in threads:
                thread.join()
            torch.set_num_threads(before)
    if failed:
        raise failed[0]


class _Closed(Exception):
    """The channel was closed: whoever waits at it shall stop."""


class _Channel(Generic[T]):
    """A bounded queue that can be ended (None comes once it is empty) and closed (everyone at it gets _Closed)."""

    def __init__(self, bound: int) -> None:
        self._bound, self._held, self._changed = bound, deque[T](), threading.Condition()
        self._ended = self._closed = False

    def put(self, value: T) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._held) < self._bound)
            if self._closed:
                raise _Closed
            self._held.append(value)
            self._changed.notify_all()

    def get(self) -> T | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ended or self._held)
            if self._closed:
                raise _Closed
            value = self._held.popleft() if self._held else None
            self._changed.notify_all()
            return value

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _out_of_memory(error: BaseException) -> bool:
    """Also of the CPU's allocator, whose errors have no type of their own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
