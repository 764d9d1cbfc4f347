"""The tables of healing."""

from __future__ import annotations

import statistics

from bench.support.tables import markdown, result


def healing() -> str:
    """Each task and budget before and after healing, and the mean over tasks."""
    run = result("healing")
    budgets = sorted({row["flops"] for row in run["rows"]}, reverse=True)
    rows = [
        (
            row["task"], f"{row['flops']:g}", f"{row['dense']:.3f}", f"{row['recovered']:.3f}", f"{row['healed']:.3f}",
            f"{row['healed'] / row['dense']:.2f}", f"{row['nats_before']:.3f}", f"{row['nats_after']:.3f}",
            f"{row['seconds']:.0f}",
        )
        for row in sorted(run["rows"], key=lambda row: (row["task"], -row["flops"]))
    ]  # fmt: skip
    means = []
    for budget in budgets:
        of_budget = [row for row in run["rows"] if row["flops"] == budget]
        before, after = (statistics.mean(row[name] / row["dense"] for row in of_budget) for name in ("recovered", "healed"))
        means.append((f"{budget:g}", f"{before:.2f}", f"{after:.2f}"))
    head = ("task", "FLOPs", "dense", "recovered", "healed", "over dense", "nats before", "nats after", "seconds")
    return (
        f"{run['examples']} examples to refit and to heal on, {run['tested']} to test on; one thread, beside others.\n\n"
        f"{markdown(head, rows)}\n\nOver the dense metric, means of the tasks:\n\n"
        f"{markdown(('FLOPs', 'recovered', 'healed'), means)}"
    )


def healing_probes() -> str:
    """What was tried while the settings were chosen."""
    run = result("healing-probes")
    rows = [
        (row["task"], f"{row['flops']:g}", row["setting"], f"{row['over_dense']:.2f}", f"{row['nats']:.2f}")
        for row in run["rows"]
    ]
    return markdown(("task", "FLOPs", "setting", "over dense", "nats"), rows)
