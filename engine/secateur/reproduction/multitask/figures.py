"""The figures of pruning with a multitask objective, drawn from the finished cells."""

from __future__ import annotations

from typing import Any

from secateur.reproduction.multitask.grid import ATTRIBUTION, EIGHT, MAGNITUDE, Cell
from secateur.reproduction.multitask.results import Results
from secateur.support.figures import figure, png

SIZE = (4.4, 3.2)


def draw(results: Results) -> dict[str, bytes]:
    """Draw a figure for each experiment of the run; return PNG data by file name."""
    drawings = {
        "settings": _settings,
        "mixture": _mixture,
        "low-resource": _low_resource,
        "initial-scores": _initial_scores,
    }
    return {f"{name}.png": drawings[name](results) for name in results.settings.experiments}


def _settings(results: Results) -> bytes:
    """Draw the mean over the tasks against the density, for each granularity."""
    drawing, (row,) = figure(1, 2, SIZE)
    for granularity, axes in zip(("element", "rank"), row, strict=True):
        for setting in EIGHT:
            method, setting_granularity, scope = setting
            if setting_granularity == granularity:
                style = "-" if scope == "global" else "--"
                color = "C0" if method == "movement" else "C1"
                _line(axes, results.curve(setting), f"{method}, {scope}", linestyle=style, color=color)
        _finish(axes, results, granularity)
    return png(drawing)


def _mixture(results: Results) -> bytes:
    """Draw one multitask model against the best ensemble at the same total budget, for each setting."""
    settings = results.settings
    drawing, (row,) = figure(1, len(settings.mixture), SIZE)
    for setting, axes in zip(settings.mixture, row, strict=True):
        _line(axes, results.curve(setting), "one multitask model", color="C0")
        budgets = sorted({*settings.densities[setting[1]], *(3 * d for d in settings.single_densities[setting[1]])})
        mixtures = [(budget, results.mixture(setting, budget)) for budget in budgets]
        points = [(budget, mixture.score) for budget, mixture in mixtures if mixture is not None]
        _line(axes, points, "best single-task models", color="C1")
        _finish(axes, results, ", ".join(setting))
        axes.set_xlabel("weights of all models / one encoder's")
    return png(drawing)


def _low_resource(results: Results) -> bytes:
    """Draw bars for each task with few examples: alone and with the others, dense and pruned."""
    settings = results.settings
    drawing, ((axes,),) = figure(1, 1, (6.4, 3.4))
    kinds = (Cell(()), Cell((), *settings.low_setting, settings.low_density))
    for number, (cell, shared) in enumerate((cell, shared) for cell in kinds for shared in (False, True)):
        heights = [
            results.of(Cell(settings.tasks if shared else (task,), *cell.setting, cell.density, low=task), task) or 0.0
            for task in settings.tasks
        ]
        label = f"{'pruned' if cell.method else 'dense'}, {'with the others' if shared else 'alone'}"
        places = [place + 0.2 * (number - 1.5) for place in range(len(heights))]
        axes.bar(places, heights, width=0.19, label=label)
    axes.set_xticks(range(len(settings.tasks)), settings.tasks)
    axes.set_ylabel(f"score with {settings.few} examples")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3, axis="y")
    return png(drawing)


def _initial_scores(results: Results) -> bytes:
    """Draw movement with scores that start from zeros, magnitude or attribution, for each granularity."""
    drawing, (row,) = figure(1, 2, SIZE)
    for granularity, axes in zip(("element", "rank"), row, strict=True):
        setting = ("movement", granularity, "global")
        _line(axes, results.curve(setting), "from zero", color="C0")
        _line(axes, results.curve(setting, scores=MAGNITUDE), "from magnitude", color="C1")
        _line(axes, results.curve(setting, scores=ATTRIBUTION), "from attribution", color="C2")
        _finish(axes, results, granularity)
    return png(drawing)


def _line(axes: Any, points: list[tuple[float, float]], label: str, **style: Any) -> None:
    """Draw a line if it has points."""
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, **style)


def _finish(axes: Any, results: Results, title: str) -> None:
    """Add the dense model's line, the title and the labels."""
    dense = results.mean(Cell(results.settings.tasks))
    if dense is not None:
        axes.axhline(dense, color="grey", linestyle=":", linewidth=1, label="dense")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("density")
    axes.set_ylabel("score, mean over tasks")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
