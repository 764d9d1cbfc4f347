"""The tables of many tasks on one model, from bench/results/routing.json."""

from __future__ import annotations

from typing import Any

from bench.support.tables import markdown, result


def routing() -> str:
    """Time to gather a task's model, memory, and throughput of a mixed stream."""
    run = result("routing")
    about, memory, stream, count = run["environment"], run["memory"], run["throughput"], len(run["tasks"])
    rows = [
        (
            row["name"], str(row["modules"]), _megabytes(row["gathered_bytes"]), f"{row['first_ms']:.0f} ms",
            f"{row['copy_ms']:.1f} ms", _times(row["cuts_ms"], row["cuts_over_copy"]),
            _times(row["model_ms"], row["model_over_copy"]),
        )
        for row in run["gathering"]
    ]  # fmt: skip
    head = ("model", "modules", "gathered", "first request", "copy", "gathering alone", "request after eviction")
    one = memory["dense"] + run["gathering"][0]["gathered_bytes"]
    sizes = [
        ("in memory, all cached", _megabytes(memory["dense"] + memory["gathered"]), _megabytes(memory["separate"])),
        ("in memory, one task cached", _megabytes(one), _megabytes(memory["separate"])),
        ("on disk", _megabytes(memory["dense"] + memory["plan_files"]), _megabytes(memory["saved_folders"])),
    ]
    labels = {"dense": "dense", "cached": "router, all cached", "one at a time": "router, one task cached"}
    served = [
        (labels[name], f"{speed:.0f}", _ratio(stream["over_dense"].get(name)), f"{stream['accuracy'][name]:.3f}")
        for name, speed in stream["examples_per_second"].items()
    ]
    return (
        f"The {count} closed tasks of the built-in T5 (other shapes: random plans), {run['keep']:.0%} of heads and neurons "
        f"kept; one thread, {about['device']}, {about['dtype']}, torch {about['torch']}. Copy: a clone of the same weights, in "
        f"turn with the others; medians, and medians of the ratios to it.\n\n{markdown(head, rows)}\n\n"
        f"Weights of all {count} tasks through the router (the dense model and the gathered ones; on disk the dense model and "
        f"{memory['plan_files'] / 1e3:.0f} kB of plans) and of {count} pruned models. The router's Python objects take "
        f"{_megabytes(memory['modules'])} beside.\n\n{markdown(('', 'router', 'separate models'), sizes)}\n\n"
        f"Scoring {stream['examples']} test examples of all tasks in random order, batches of {stream['batch']} (a batch's "
        "examples of one task run together, with the dense model too):\n\n"
        f"{markdown(('models', 'examples/s', 'against dense', 'accuracy'), served)}"
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _times(milliseconds: float, ratio: dict[str, Any]) -> str:
    return f"{milliseconds:.1f} ms ({ratio['median']:.1f}x)"


def _ratio(ratio: dict[str, Any] | None) -> str:
    return "1x" if ratio is None else f"{1 / ratio['median']:.2f}x"
