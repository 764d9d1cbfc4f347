"""Score windows while shards are read and written: threads with bounded queues between them, and results in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from secateur.corpus.compiling import LabelScores, compiled
from secateur.corpus.openvino_runtime import openvino_scores
from secateur.corpus.shapes import longest, stepped
from secateur.corpus.windows import NOT_FINITE, WRITTEN, Window
from secateur.support.environment import out_of_memory
from secateur.tasks import Item, Task
from secateur.tasks.batches import Batch, UnreadableError, buckets, model_device
from secateur.tasks.generation import NotFiniteError

T = TypeVar("T")
# Bounds of the queues: windows that are read ahead of the scored one, and batches that wait for each worker.
WINDOWS, BATCHES = 2, 2
# Seconds to wait for each thread after an interruption: the reader may wait for a slow file or network for ever.
_PATIENCE = 2.0


@dataclass
class Runner:
    """A model, its task, and how it is run.

    Attributes:
        model: The model.
        task: The task.
        max_tokens: Padded input tokens in a batch. It is halved permanently when memory runs out.
        workers: Threads that run batches.
        threads: CPU threads of each worker; None means torch's own number.
        compiled: A mode of torch.compile; None means not compiled.
        runtime: What computes the task's label scores: "torch" or "openvino".
        busy: Seconds that all workers together have spent in the model.
        halvings: How often max_tokens was halved.
    """

    model: nn.Module
    task: Task
    max_tokens: int
    workers: int = 1
    threads: int | None = None
    compiled: str | None = None
    runtime: str = "torch"
    busy: float = 0.0
    halvings: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _label_scores: LabelScores | None = field(default=None, init=False)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A context in which batches may be scored, also from several threads, as `runtime` and `compiled` say.

        Raises:
            InputError: As in `Task.scoring`; the model cannot be compiled, or the runtime cannot take it.
        """
        task, model = self.task, self.model
        with ExitStack() as entered:
            if self.runtime == "openvino":
                self._label_scores = openvino_scores(task, model, self.workers, self.threads or torch.get_num_threads())
            else:
                entered.enter_context(task.scoring(model))
                if self.compiled is not None:
                    self._label_scores = entered.enter_context(compiled(task, model, self.compiled, self.threads))
            try:
                yield
            finally:
                self._label_scores = None

    def batches(self, window: Window) -> list[list[Item]]:
        """Split a window's items into batches of at most max_tokens padded tokens, but of at least one item.

        Texts and pairs of texts have batches of their own: some models take only rows with as many end marks as one another.
        """
        kinds = [[item for item in window.items if item.pair is pair] for pair in (False, True)]
        return [batch for items in kinds for batch in buckets(items, self.max_tokens, self.padded)]

    def padded(self, length: int) -> int:
        """Return the length that a batch is padded to, from the length of its longest input.

        Where oneDNN computes the matrix products (in reduced precision on a CPU, in compiled code, and in OpenVINO), only few
        lengths are used.
        """
        return min(stepped(length), max(self._longest, length)) if self._few_lengths else length

    @cached_property
    def _few_lengths(self) -> bool:
        """Whether oneDNN computes the matrix products."""
        parameter = next(self.model.parameters())
        other_products = self.compiled is not None or self.runtime != "torch"
        return parameter.device.type == "cpu" and (other_products or parameter.dtype.itemsize < 4)

    @cached_property  # Used for each item.
    def _longest(self) -> int:
        """Tokens of the longest input that the model takes."""
        return longest(self.task, self.model)

    def label_scores(self, batch: Batch) -> Tensor:
        """Compute the task's label scores of a batch, inside `scoring`. [items, labels]"""
        return (self._label_scores or self.task.label_scores)(self.model, batch)

    def score(self, window: Window, items: Sequence[Item]) -> None:
        """Score a batch of a window's items.

        A batch that does not fit into memory is split in two. An item that does not fit alone is rejected.
        """
        length = self.padded(items[0].length)
        if len(items) * length > self.max_tokens and len(items) > 1:
            self._halves(window, items)
            return
        began = time.perf_counter()
        try:
            batch = self.task.collate_inputs(items, model_device(self.model), length)
            if window.kind in WRITTEN:
                results: Any = self.task.written(self.model, batch)
            else:
                results = self.label_scores(batch).cpu()
        except (NotFiniteError, UnreadableError) as error:
            if len(items) > 1:
                self._halves(window, items)
            else:
                window.reject(items[0], error.reason if isinstance(error, UnreadableError) else NOT_FINITE)
            return
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        else:
            with self._lock:
                self.busy += time.perf_counter() - began
            (window.write if window.kind in WRITTEN else window.fill)(items, results, len(items) * length)
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
        """Score the two halves of a batch."""
        middle = len(items) // 2
        self.score(window, items[:middle])
        self.score(window, items[middle:])


def scored(events: Iterator[T], runner: Runner) -> Iterator[T]:
    """Yield the same events in the same order, each window after it is scored.

    A separate thread iterates over `events`: it reads and encodes ahead. The runner's workers score the batches. An exception
    in any thread is raised here. The threads end when the iteration ends, also when it ends early.

    Args:
        events: Windows, and any other objects between them.
        runner: The model, and how it is run.
    """
    waiting: _Channel[T] = _Channel(WINDOWS)
    batches: _Channel[tuple[Window, list[Item]]] = _Channel(BATCHES * runner.workers)
    errors: list[BaseException] = []

    def guarded(work: Any) -> None:
        """Run a thread's work, and stop all threads if it fails."""
        try:
            work()
        except _Closed:
            pass
        except BaseException as error:
            errors.append(error)
            waiting.close()
            batches.close()

    def feed() -> None:
        """Read events, and hand out their batches."""
        for event in events:
            waiting.put(event)
            if isinstance(event, Window):
                for items in runner.batches(event):
                    batches.put((event, items))
        waiting.end()
        batches.end()

    def run() -> None:
        """Score batches, as one of the runner's workers."""
        if runner.threads is not None:
            torch.set_num_threads(runner.threads)
        with torch.inference_mode():
            while (window_and_items := batches.get()) is not None:
                runner.score(*window_and_items)

    before, patience = torch.get_num_threads(), None
    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in (feed, *[run] * runner.workers)]
    with runner.scoring():
        for thread in threads:
            thread.start()
        try:
            while (event := waiting.get()) is not None:
                if isinstance(event, Window):
                    while not event.done.wait(0.5):
                        if errors:
                            raise errors[0]
                yield event
        except _Closed:
            raise errors[0] from None
        except KeyboardInterrupt:
            patience = _PATIENCE
            raise
        finally:
            waiting.close()
            batches.close()
            for thread in threads:
                thread.join(patience)
            torch.set_num_threads(before)
    if errors:
        raise errors[0]


class _Closed(Exception):
    """The channel was closed; the thread that waits at it must stop."""


class _Channel(Generic[T]):
    """A bounded queue. After `end`, it returns None once it is empty. After `close`, all its users get _Closed."""

    def __init__(self, bound: int) -> None:
        self._bound, self._held, self._changed = bound, deque[T](), threading.Condition()
        self._ended = self._closed = False

    def put(self, value: T) -> None:
        """Add a value; wait while the queue is full."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._held) < self._bound)
            if self._closed:
                raise _Closed
            self._held.append(value)
            self._changed.notify_all()

    def get(self) -> T | None:
        """Take the next value; wait while the queue is empty. None: the queue has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ended or self._held)
            if self._closed:
                raise _Closed
            value = self._held.popleft() if self._held else None
            self._changed.notify_all()
            return value

    def end(self) -> None:
        """No more values will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop all threads at the queue."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
