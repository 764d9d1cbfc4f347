"""Timing of several functions in turn. The ratios stay valid on a machine whose speed drifts."""

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
    apart: float = 0.0,
) -> dict[str, Any]:
    """Time the functions in turn for `rounds` rounds. Each round begins with another function.

    Args:
        functions: The functions by name. The first one is the reference of the ratios.
        rounds: How often each function is timed.
        warmup: How often each function runs before the first round.
        clock: The clock in seconds. `time.process_time` counts the computation of this process alone. It suits single-threaded
            functions on a machine that other processes also use.
        apart: Seconds of sleep before each function, which then runs once untimed. Threads of another library may wait busily
            for a while after its last call, and slow what follows.

    Returns:
        The median milliseconds of each function. For each function but the first, also the median, the quartiles and the range
        (lowest and highest) of its time divided by the first function's time in the same round.
    """
    names = list(functions)
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            if apart:
                time.sleep(apart)
                functions[name]()
            start = clock()
            functions[name]()
            times[name].append(clock() - start)
    first = names[0]
    result: dict[str, Any] = {f"{name}_ms": round(1e3 * statistics.median(times[name]), 3) for name in names}
    for name in names[1:]:
        ratios = [a / b for a, b in zip(times[name], times[first], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[f"{name}_over_{first}"] = {
            "median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)],
            "range": [round(min(ratios), 4), round(max(ratios), 4)],
        }  # fmt: skip
    return result
