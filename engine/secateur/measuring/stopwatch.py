"""Milliseconds of each branch within a whole forward pass, where its weights are as cold as in use."""

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
    """now: a mark of the present; between: milliseconds from one mark to a later one, once `wait` has returned."""

    now: Callable[[], Any]
    between: Callable[[Any, Any], float]
    wait: Callable[[], None]


@dataclass(frozen=True)
class Times:
    """Milliseconds of a whole forward pass, and of each branch in it."""

    total: float
    branches: dict[str, float]


def clock(device: torch.device) -> Clock:
    """The device's clock. A GPU marks its own queue, so that the host waits at the end of a pass alone."""
    if device.type != "cuda":
        return Clock(time.perf_counter, lambda start, end: 1e3 * (end - start), lambda: None)

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    return Clock(mark, lambda start, end: start.elapsed_time(end), lambda: torch.cuda.synchronize(device))


@contextmanager
def stopwatch(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[Callable[[], Times]]:
    """A function that runs the model on the batch and times it, in whatever mode it is. No hooks stay behind.

    A branch's time begins where its first module is called, and ends where its out-projection has run: the activation and
    attention's core are in it, the norm and the residual addition aren't.
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
        return Times(watch.between(start, last), {name: watch.between(*both) for name, both in marks.items()})

    try:
        for name, branch in branches(model).items():
            handles.append(model.get_submodule(branch.path).register_forward_pre_hook(begin(name)))
            handles.append(model.get_submodule(branch.output).register_forward_hook(end(name)))
        yield run
    finally:
        for handle in handles:
            handle.remove()
