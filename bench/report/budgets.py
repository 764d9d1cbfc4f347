"""The tables and the plot of methods under the same budgets of FLOPs, from bench/results/budgets.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.support.tables import markdown, result
from secateur.support.figures import MARKERS, colors, figure, legend, png

MODELS = {
    "t5": "The built-in T5", "bert": "BERT classifiers", "bert-frozen": "BERT classifiers, encoder as published",
    "smollm": "SmolLM2-135M-Instruct by prompt",
}  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarise the runs of each model, method and share.

    mean: the mean over tasks of accuracy / dense, where a task's value is the mean of its draws. deviation: the standard
    deviation over draws of that mean. Also the worst task, CPU seconds, and the number of tasks that have a result.
    """
    summaries = []
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
        summaries.append(
            {
                "model": model, "method": method, "share": share, "mean": _mean(of_task.values()),
                "deviation": statistics.stdev(of_draw) if len(of_draw) > 1 else 0.0,
                "worst": worst, "worst_value": of_task[worst], "seconds": _mean(row["cpu_seconds"] for row in done),
                "flops": _mean(row["flops"] for row in done), "tasks": len(tasks), "failed": len(same) - len(done),
            }
        )  # fmt: skip
    return summaries


def budgets() -> str:
    """Make a table for each model: mean over tasks of accuracy / dense, and the worst task, for each method and share."""
    run = result("budgets")
    rows, shares = summary(run["rows"]), run["shares"]
    tables = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = []
        for method in dict.fromkeys(row["method"] for row in rows if row["model"] == model):
            at = {row["share"]: row for row in rows if row["model"] == model and row["method"] == method}
            cells = [_cell(at[share]) if share in at else "-" for share in shares]
            lines.append((method, *cells, f"{_mean(row['seconds'] for row in at.values()):.1f}"))
        of_model = [row for row in run["rows"] if row["model"] == model]
        tasks = list(dict.fromkeys(row["task"] for row in of_model))
        dense = _mean({row["task"]: row["dense"] for row in of_model}.values())
        draws = len({row["draw"] for row in of_model})
        head = ("method", *(f"{share:g} of the FLOPs" for share in shares), "CPU seconds")
        tables.append(
            f"{MODELS[model]}, {_counted(len(tasks), 'task')} (mean of the dense models {dense:.3f}): accuracy "
            f"over the dense model's, mean over tasks of {_counted(draws, 'draw')} of {run['examples']} examples, "
            f"with the standard deviation over draws of that mean, and the worst task; {run['tested']} examples to test on."
            f"\n\n{markdown(head, lines)}"
        )
    reasons = {(entry["model"], entry["why"]): entry["method"] for entry in reversed(run["left_out"])}
    tables += [f"{method} was left out for {model}: {why}." for (model, why), method in reasons.items()]
    return "\n\n".join(tables)


def budgets_summary() -> str:
    """Make the README's table: the mean over tasks of accuracy / dense, for each method, model and share of the FLOPs."""
    run = result("budgets")
    means, shares = summary(run["rows"]), run["shares"]
    models = ("t5", "bert")
    cells = {(row["model"], row["method"], row["share"]): f"{row['mean']:.3f}" for row in means}
    columns = [(model, share) for model in models for share in shares if any(key[::2] == (model, share) for key in cells)]
    methods = sorted(
        {row["method"] for row in means if row["model"] in models},
        key=lambda method: (not method.startswith("secateur"), method.lower()),
    )
    lines = [(method, *(cells.get((model, method, share), "-") for model, share in columns)) for method in methods]
    short = {"t5": "T5", "bert": "BERT"}
    head = ("method", *(f"{short[model]}, {share:g} of the FLOPs" for model, share in columns))
    tasks = {model: len({row["task"] for row in run["rows"] if row["model"] == model}) for model in models}
    draws = len({row["draw"] for row in run["rows"] if row["model"] in models})
    return (
        f"Accuracy over the dense model's, mean over tasks and {draws} draws of {run['examples']} examples: the built-in "
        f"T5 ({_counted(tasks['t5'], 'task')}) and BERT classifiers ({_counted(tasks['bert'], 'task')}). No method trains.\n\n"
        f"{markdown(head, lines)}"
    )


def efforts() -> str:
    """Make the table of accuracy by effort."""
    return methods_table("efforts", "effort", {"secateur": "default", "secateur, low effort": "low"})


def methods_table(name: str, column: str, names: Mapping[str, str]) -> str:
    """Make a table of a result of `measurements/budgets.py`: the mean over tasks of accuracy / dense, and the worst task.

    Args:
        name: The name of the result.
        column: The head of the column of methods.
        names: What stands there for a method. Others are named by what follows "secateur, ".
    """
    run = result(name)
    lines = []
    for row in summary(run["rows"]):
        worst = f"{row['worst_value']:.3f} ({row['worst']})"
        method = names.get(row["method"], row["method"].removeprefix("secateur, "))
        of_model = [entry for entry in run["rows"] if entry["model"] == row["model"]]
        draws = {entry["draw"] for entry in of_model}
        counts = str(row["tasks"]), str(len(draws)), str(of_model[0]["examples"]), str(of_model[0]["tested"])
        cell = {key: row[key] for key in ("model", "method", "share")}
        texts = [entry for entry in run["rows"] if entry["metric"] == "exact match" and cell.items() <= entry.items()]
        of_texts = f"{summary(texts)[0]['mean']:.3f}" if texts else "-"
        of_row = f"{row['mean']:.3f}", of_texts, worst, f"{row['seconds']:.0f}"
        lines.append((MODELS[row["model"]], method, f"{row['share']:g}", *of_row, *counts))
    counted = ("tasks", "draws", "examples", "tested")
    head = ("model", column, "of the FLOPs", "accuracy over dense", "of open tasks", "worst task", "CPU seconds", *counted)
    return (
        "No training. Mean over tasks and draws of the examples, on which a model is scored and refitted. Tested: the examples "
        "that the accuracy is measured on. Open tasks: those with texts as targets, which hide less damage than labels do. "
        f"Seconds are of one thread.\n\n{markdown(head, lines)}"
    )


def pruning() -> str:
    """Make the table of the steps of pruning: their time in forward passes, and the speed-up beside the counted FLOPs."""
    run = result("pruning")
    steps = list(dict.fromkeys(step for row in run["rows"] for step in row["passes"]))
    rows = [
        (row["name"], *(f"{row['passes'].get(step, 0.0):.1f}" for step in steps), f"{row['total']:.1f}",
         f"{row['speedup']:.2f}x", f"{row['flops_speedup']:.2f}x", f"{row['reached']:.0%}")
        for row in run["rows"]
    ]  # fmt: skip
    size, length = run["rows"][0]["batch"]
    return (
        f"Pruning to {run['flops']:g} of the layers' FLOPs, widths multiples of {run['align']}: time of each step "
        f"in forward passes over the {run['examples']:,} calibration examples, and the pruned model's speed-up at {size} x "
        f"{length} tokens beside what its FLOPs allow; one thread, {run['environment']['device']}.\n\n"
        + markdown(("model", *steps, "all", "speed-up", "FLOPs allow", "reached"), rows)
    )


def latency() -> str:
    """Make the table of speed-ups asked for and delivered, and of the errors of the latency table's predictions."""
    run = result("latency")
    asked = list(dict.fromkeys(request["asked"] for row in run["models"] for request in row["asked"]))
    rows = []
    for row in run["models"]:
        delivered = {request["asked"]: request for request in row["asked"]}
        cells = [f"{delivered[a]['delivered']:.2f}x" if "delivered" in delivered[a] else _refusal(delivered[a]) for a in asked]
        errors = [prediction["error"] for prediction in row["predicted"]]
        rows.append((row["name"], *cells, f"{min(errors):+.0%} to {max(errors):+.0%}"))
    return (
        "Speed-ups asked for and delivered (32 x 64 tokens, one thread, "
        f"{run['environment']['device']}): the table of each site's latency plans the widths, the whole model is rebuilt, "
        "timed and corrected. Last: a whole model's measured speed-up against what the table alone predicts.\n\n"
        + markdown(("model", *(f"asked for {a:g}x" for a in asked), "prediction off by"), rows)
    )


def _refusal(asked: dict[str, Any]) -> str:
    """The reachable speed-ups, in the words of the error."""
    expected, _, measured = asked["refused"].partition("; measured")
    return f"refused: {f'measured{measured}' if measured else expected.partition('expected ')[2].partition(', got')[0]}"


def budgets_plot() -> dict[str, bytes]:
    """Draw budgets.png, a curve for each method.

    Above: the mean over tasks of accuracy / dense against the share of FLOPs that the built model has. Below: one task's
    accuracy / dense against the measured speed-up.
    """
    run = result("budgets")
    means = summary(run["rows"])
    models = list(dict.fromkeys(row["model"] for row in run["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in run["rows"]))
    draws, tested = len({row["draw"] for row in run["rows"]}), run["tested"]
    drawing, grid = figure(
        2, len(models), (5.2, 3.8), share_x="row", share_y=True,
        title=f"{', '.join(MODELS[model] for model in models)}: accuracy under a budget (n = {tested} test examples of each "
        f"task, {run['environment']['device']})",
        caption=f"Error bars, above: standard deviation over the {draws} draws of the examples. Below: one run, no error bars; "
        "speed-up of 32 x 64 tokens, one thread. All lines begin at the dense model.",
    )  # fmt: skip
    for model, axes in zip(models, grid[0], strict=True):
        rows = [row for row in means if row["model"] == model]
        _curves(axes, methods, [(row["method"], row["flops"], row["mean"], row["deviation"]) for row in rows])
        axes.set_title(MODELS[model], fontsize=9)
        axes.set_xlabel("share of the layers' FLOPs left")
        axes.set_ylabel("accuracy / dense, mean over tasks")
    grid[0][0].invert_xaxis()  # The axes of a row share their limits.
    for model, axes in zip(models, grid[1], strict=True):
        rows = [row for row in run["timed"] if row["model"] == model]
        _curves(axes, methods, [(row["method"], row["speedup"], row["accuracy"] / row["dense"], 0.0) for row in rows])
        axes.set_xlabel("measured speed-up")
        axes.set_ylabel(f"accuracy / dense of {rows[0]['task'] if rows else 'no task'}")
    legend(drawing)
    return {"budgets.png": png(drawing)}


def _curves(axes: Any, methods: Sequence[str], points: Sequence[tuple[str, float, float, float]]) -> None:
    """Draw a curve for each method. points: method, x, y and the error of y; the dense model is at (1, 1)."""
    for number, (method, color) in enumerate(zip(methods, colors(len(methods)), strict=True)):
        own = sorted(point[1:] for point in points if point[0] == method)
        if not own:
            continue
        xs, ys, bars = zip(*sorted([*own, (1.0, 1.0, 0.0)]), strict=True)
        axes.errorbar(
            xs, ys, yerr=bars if any(bars) else None, linestyle="-" if method.startswith("secateur") else "--",
            linewidth=2.2 if method == "secateur" else 1.2, marker=MARKERS[number % len(MARKERS)], markersize=4, capsize=2,
            label=method, color=color,
        )  # fmt: skip


def _cell(row: dict[str, Any]) -> str:
    """The mean, its deviation where there is one, and the worst task; how many runs a method refused."""
    spread = f" ± {row['deviation']:.3f}" if row["deviation"] else ""
    failed = f", {row['failed']} refused" if row["failed"] else ""
    return f"{row['mean']:.3f}{spread} ({row['worst']} {row['worst_value']:.2f}{failed})"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _mean(values: Any) -> float:
    return float(statistics.mean(values))
