"""Time each branch inside a whole forward pass, where its weights are as cold in the caches as in real use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.measuring.synthetic import forward_options
from secateur.model.families import branches


@dataclass(frozen=True)
class Clock:
    """A device's clock.

    Attributes:
        now: Return a mark of the present moment.
        between: Return the milliseconds from one mark to a later one. Call `wait` first.
        wait: Block until the device has passed all marks.
    """

    now: Callable[[], Any]
    between: Callable[[Any, Any], float]
    wait: Callable[[], None]


@dataclass(frozen=True)
class Times:
    """The times of one forward pass.

    Attributes:
        total: Milliseconds of the whole pass.
        branches: Milliseconds of each branch in it.
    """

    total: float
    branches: dict[str, float]


def clock(device: torch.device) -> Clock:
    """Return a device's clock. On a GPU, marks are events in its own queue, so the host waits only at the end of a pass."""
    if device.type != "cuda":
        return Clock(time.perf_counter, lambda start, end: 1e3 * (end - start), lambda: None)

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    return Clock(mark, lambda start, end: start.elapsed_time(end), lambda: torch.cuda.synchronize(device))


@contextmanager
def stopwatch(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[Callable[[], Times]]:
    """Yield a function that runs the model on the batch and times it.

    The model runs in the mode that it is in. All hooks are removed at the end.

    A branch's time begins where its first module is called, and ends where its out-projection has run. It includes the
    activation function and the attention's core, but not the norm or the residual addition.

    Args:
        model: The model.
        batch: Its keyword arguments.
    """
    watch, options = clock(next(model.parameters()).device), forward_options(model)
    marks: dict[str, list[Any]] = {}
    handles = []

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: marks.update({name: [watch.now()]})

    def end(name: str) -> Callable[..., None]:
        return lambda *_: marks[name].append(watch.now())

    def run() -> Times:
        watch.wait()
        start = watch.now()
        model(**batch, **options)
        last = watch.now()
        watch.wait()
        return Times(watch.between(start, last), {name: watch.between(*pair) for name, pair in marks.items()})

    try:
        for name, branch in branches(model).items():
            handles.append(model.get_submodule(branch.path).register_forward_pre_hook(begin(name)))
            handles.append(model.get_submodule(branch.output).register_forward_hook(end(name)))
        yield run
    finally:
        for handle in handles:
            handle.remove()
