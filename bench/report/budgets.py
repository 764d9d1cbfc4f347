"""The tables and the plot of methods under the same budgets of FLOPs, from bench/results/budgets.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.support.provenance import ROOT
from bench.support.tables import markdown, result
from secateur.support.figures import figure, png

MODELS = {"t5": "The built-in T5", "bert": "BERT classifiers", "bert-frozen": "BERT classifiers, encoder as published"}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model, method and share: the mean over tasks of accuracy / dense, each task's own being the mean of its draws;
    the standard deviation over draws of that mean; the worst task; CPU seconds; tasks for which there is a result."""
    found = []
    for model, method, share in dict.fromkeys((row["model"], row["method"], row["share"]) for row in rows):
        same = [row for row in rows if (row["model"], row["method"], row["share"]) == (model, method, share)]
        done = [row for row in same if "error" not in row]
        if not done:
            continue
        tasks = list(dict.fromkeys(row["task"] for row in done))
        of_task = {task: _mean(row["accuracy"] / row["dense"] for row in done if row["task"] == task) for task in tasks}
        of_draw = [
            _mean(row["accuracy"] / row["dense"] for row in done if row["draw"] == draw)
            for draw in dict.fromkeys(row["draw"] for row in done)
        ]
        worst = min(of_task, key=lambda task: of_task[task])
        found.append(
            {
                "model": model, "method": method, "share": share, "mean": _mean(of_task.values()),
                "deviation": statistics.stdev(of_draw) if len(of_draw) > 1 else 0.0,
                "worst": worst, "worst_value": of_task[worst], "seconds": _mean(row["cpu_seconds"] for row in done),
                "flops": _mean(row["flops"] for row in done), "tasks": len(tasks), "failed": len(same) - len(done),
            }
        )  # fmt: skip
    return found


def budgets() -> str:
    """A table a model: mean over tasks of accuracy / dense, and the worst task, for each method and share."""
    found = result("budgets")
    rows, shares = summary(found["rows"]), found["shares"]
    tables = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = []
        for method in dict.fromkeys(row["method"] for row in rows if row["model"] == model):
            at = {row["share"]: row for row in rows if row["model"] == model and row["method"] == method}
            cells = [_cell(at[share]) if share in at else "-" for share in shares]
            lines.append((method, *cells, f"{_mean(row['seconds'] for row in at.values()):.1f}"))
        of_model = [row for row in found["rows"] if row["model"] == model]
        tasks = list(dict.fromkeys(row["task"] for row in of_model))
        dense = _mean({row["task"]: row["dense"] for row in of_model}.values())
        draws = len({row["draw"] for row in of_model})
        head = ("method", *(f"{share:g} of the FLOPs" for share in shares), "CPU seconds")
        tables.append(
            f"{MODELS[model]}, {_counted(len(tasks), 'task')} (mean of the dense models {dense:.3f}): accuracy "
            f"over the dense model's, mean over tasks of {_counted(draws, 'draw')} of {found['examples']} examples, "
            f"with the standard deviation over draws of that mean, and the worst task; {found['tested']} examples to test on."
            f"\n\n{markdown(head, lines)}"
        )
    reasons = {(entry["model"], entry["why"]): entry["method"] for entry in reversed(found["left_out"])}
    tables += [f"{method} was left out for {model}: {why}." for (model, why), method in reasons.items()]
    return "\n\n".join(tables)


def pruning() -> str:
    """What the steps of pruning take, in forward passes, and what the counted FLOPs give in time."""
    found = result("pruning")
    steps = list(dict.fromkeys(step for row in found["rows"] for step in row["passes"]))
    rows = [
        (row["name"], *(f"{row['passes'].get(step, 0.0):.1f}" for step in steps), f"{row['total']:.1f}",
         f"{row['speedup']:.2f}x", f"{row['flops_speedup']:.2f}x", f"{row['reached']:.0%}")
        for row in found["rows"]
    ]  # fmt: skip
    size, length = found["rows"][0]["batch"]
    return (
        f"Pruning to {found['flops']:g} of the layers' FLOPs, widths multiples of {found['align']}: time of each step "
        f"in forward passes over the {found['examples']:,} calibration examples, and the pruned model's speed-up at {size} x "
        f"{length} tokens beside what its FLOPs allow; one thread, {found['environment']['device']}.\n\n"
        + markdown(("model", *steps, "all", "speed-up", "FLOPs allow", "reached"), rows)
    )


def latency() -> str:
    """Speed-ups asked for and delivered, and how far the table's predictions were off."""
    found = result("latency")
    asked = list(dict.fromkeys(each["asked"] for row in found["models"] for each in row["asked"]))
    rows = []
    for row in found["models"]:
        delivered = {each["asked"]: each for each in row["asked"]}
        cells = [f"{delivered[a]['delivered']:.2f}x" if "delivered" in delivered[a] else _refusal(delivered[a]) for a in asked]
        errors = [each["error"] for each in row["predicted"]]
        rows.append((row["name"], *cells, f"{min(errors):+.0%} to {max(errors):+.0%}"))
    return (
        "Speed-ups asked for and delivered (32 x 64 tokens, one thread, "
        f"{found['environment']['device']}): the table of each site's latency plans the widths, the whole model is rebuilt, "
        "timed and corrected. Last: a whole model's measured speed-up against what the table alone predicts.\n\n"
        + markdown(("model", *(f"asked for {a:g}x" for a in asked), "prediction off by"), rows)
    )


def _refusal(asked: dict[str, Any]) -> str:
    """What was reachable, in the words of the error."""
    text = asked["refused"]
    return f"refused: {text.partition('; ')[2] or text.partition('expected ')[2].partition(', got')[0]}"


def budgets_plot() -> None:
    """docs/budgets.png: accuracy over dense, mean over tasks, against the share of FLOPs really left, and one task's against
    the measured speed-up; a curve a method."""
    found = result("budgets")
    means = summary(found["rows"])
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    made, grid = figure(2, len(models), (5.2, 3.8))
    for model, axes in zip(models, grid[0], strict=True):
        rows = [row for row in means if row["model"] == model]
        _curves(axes, methods, [(row["method"], row["flops"], row["mean"], row["deviation"]) for row in rows])
        axes.invert_xaxis()
        axes.set_title(MODELS[model], fontsize=9)
        axes.set_xlabel("share of the layers' FLOPs left")
        axes.set_ylabel("accuracy / dense, mean over tasks")
    for model, axes in zip(models, grid[1], strict=True):
        rows = [row for row in found["timed"] if row["model"] == model]
        _curves(axes, methods, [(row["method"], row["speedup"], row["accuracy"] / row["dense"], 0.0) for row in rows])
        axes.set_xlabel("measured speed-up of 32 x 64 tokens, one thread")
        axes.set_ylabel(f"accuracy / dense of {rows[0]['task'] if rows else 'no task'}")
    (ROOT / "docs" / "budgets.png").write_bytes(png(made))


def _curves(axes: Any, methods: Sequence[str], points: Sequence[tuple[str, float, float, float]]) -> None:
    """points: method, x, y and its error; the dense model is at (1, 1)."""
    for number, method in enumerate(methods):
        own = sorted(point[1:] for point in points if point[0] == method)
        if not own:
            continue
        xs, ys, bars = zip(*sorted([*own, (1.0, 1.0, 0.0)]), strict=True)
        style = "-" if method.startswith("secateur") else "--" if number % 2 else ":"
        axes.errorbar(
            xs, ys, yerr=bars, linestyle=style, linewidth=2.2 if method == "secateur" else 1.2, marker="o", markersize=3,
            capsize=2, label=method, color=f"C{number % 10}", alpha=0.9 if number < 10 else 0.5,
        )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)


def _cell(row: dict[str, Any]) -> str:
    """The mean, its deviation where there is one, and the worst task; how many runs a method refused."""
    spread = f" ± {row['deviation']:.3f}" if row["deviation"] else ""
    failed = f", {row['failed']} refused" if row["failed"] else ""
    return f"{row['mean']:.3f}{spread} ({row['worst']} {row['worst_value']:.2f}{failed})"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _mean(values: Any) -> float:
    return float(statistics.mean(values))
