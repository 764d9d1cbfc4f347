"""Timing of several functions in turn: ratios that hold on a machine whose speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Runs the functions in turn, `rounds` times, each round beginning with another one.

    Returns for each its median milliseconds, and for all but the first the median and quartiles of its time divided by the
    first one's time in the same round. clock: time.process_time counts what this process computes alone, for functions of one
    thread on a machine that others use too.
    """
    names = list(functions)
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            start = clock()
            functions[name]()
            times[name].append(clock() - start)
    first = names[0]
    result: dict[str, Any] = {f"{name}_ms": round(1e3 * statistics.median(times[name]), 3) for name in names}
    for name in names[1:]:
        ratios = [a / b for a, b in zip(times[name], times[first], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[f"{name}_over_{first}"] = {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}
    return result
