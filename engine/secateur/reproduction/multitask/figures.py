"""The figures of pruning with a multitask objective, drawn from the finished cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from secateur.reproduction.multitask.grid import ATTRIBUTION, EIGHT, MAGNITUDE, Cell
from secateur.reproduction.multitask.results import Results
from secateur.support.figures import GREY, MARKERS, PALETTE, figure, legend, png, title_of

SIZE = (4.4, 3.2)
_CAPTION = "Each point is one training run; no error bars. Dotted: the dense shared model."


def draw(results: Results, environment: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw a figure for each experiment of the run; return PNG data by file name. `environment`: that of the run."""
    settings = results.settings
    drawings: dict[str, tuple[str, Callable[[Results, str], bytes]]] = {
        "settings": ("methods and scopes", _settings),
        "mixture": ("one multitask model against single-task models of the same total size", _mixture),
        "low-resource": (f"tasks with {settings.few} training examples", _low_resource),
        "initial-scores": ("movement by its initial scores", _initial_scores),
    }
    examples = f"at most {settings.tested}" if settings.tested else "all"
    model = f"{settings.model}, {', '.join(settings.tasks)}"
    figures = {}
    for name in settings.experiments:
        what, drawn = drawings[name]
        figures[f"{name}.png"] = drawn(results, title_of(model, f"{examples} evaluation examples a task", environment, what))
    return figures


def _settings(results: Results, title: str) -> bytes:
    """Draw the mean over the tasks against the density, for each granularity."""
    drawing, (row,) = figure(1, 2, SIZE, title=title, caption=_CAPTION, share_y=True)
    names = list(dict.fromkeys((method, scope) for method, _, scope in EIGHT))
    for granularity, axes in zip(("element", "rank"), row, strict=True):
        for setting in EIGHT:
            method, setting_granularity, scope = setting
            if setting_granularity == granularity:
                style = "-" if scope == "global" else "--"
                number = names.index((method, scope))
                _line(axes, results.curve(setting), f"{method}, {scope}", number, linestyle=style)
        _finish(axes, results, granularity)
    legend(drawing)
    return png(drawing)


def _mixture(results: Results, title: str) -> bytes:
    """Draw one multitask model against the best ensemble at the same total budget, for each setting."""
    settings = results.settings
    drawing, (row,) = figure(1, len(settings.mixture), SIZE, title=title, caption=_CAPTION, share_y=True)
    for setting, axes in zip(settings.mixture, row, strict=True):
        _line(axes, results.curve(setting), "one multitask model", 0)
        budgets = sorted({*settings.densities[setting[1]], *(3 * d for d in settings.single_densities[setting[1]])})
        mixtures = [(budget, results.mixture(setting, budget)) for budget in budgets]
        points = [(budget, mixture.score) for budget, mixture in mixtures if mixture is not None]
        _line(axes, points, "best single-task models", 1)
        _finish(axes, results, ", ".join(setting))
        axes.set_xlabel("weights of all models / one encoder's")
    legend(drawing)
    return png(drawing)


def _low_resource(results: Results, title: str) -> bytes:
    """Draw bars for each task with few examples: alone and with the others, dense and pruned."""
    settings = results.settings
    drawing, ((axes,),) = figure(1, 1, (7.4, 3.8), title=title, caption="Each bar is one training run; no error bars.")
    kinds = (Cell(()), Cell((), *settings.low_setting, settings.low_density))
    for number, (cell, shared) in enumerate((cell, shared) for cell in kinds for shared in (False, True)):
        heights = [
            results.of(Cell(settings.tasks if shared else (task,), *cell.setting, cell.density, low=task), task) or 0.0
            for task in settings.tasks
        ]
        label = f"{'pruned' if cell.method else 'dense'}, {'with the others' if shared else 'alone'}"
        places = [place + 0.2 * (number - 1.5) for place in range(len(heights))]
        axes.bar(places, heights, width=0.19, color=PALETTE[number], label=label)
    axes.set_xticks(range(len(settings.tasks)), settings.tasks)
    axes.set_xlabel("task with few examples")
    axes.set_ylabel(f"score with {settings.few} examples")
    axes.set_ylim(0, 1)
    legend(drawing)
    return png(drawing)


def _initial_scores(results: Results, title: str) -> bytes:
    """Draw movement with scores that start from zeros, magnitude or attribution, for each granularity."""
    drawing, (row,) = figure(1, 2, SIZE, title=title, caption=_CAPTION, share_y=True)
    for granularity, axes in zip(("element", "rank"), row, strict=True):
        setting = ("movement", granularity, "global")
        _line(axes, results.curve(setting), "from zero", 0)
        _line(axes, results.curve(setting, scores=MAGNITUDE), "from magnitude", 1)
        _line(axes, results.curve(setting, scores=ATTRIBUTION), "from attribution", 2)
        _finish(axes, results, granularity)
    legend(drawing)
    return png(drawing)


def _line(axes: Any, points: list[tuple[float, float]], label: str, number: int, **style: Any) -> None:
    """Draw a line if it has points. `number` gives its colour and marker."""
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, marker=MARKERS[number], color=PALETTE[number], markersize=4, label=label, **style)


def _finish(axes: Any, results: Results, title: str) -> None:
    """Add the dense model's line, the title and the labels."""
    dense = results.mean(Cell(results.settings.tasks))
    if dense is not None:
        axes.axhline(dense, color=GREY, linestyle=":", linewidth=1, label="dense")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("density (share of weights left)")
    axes.set_ylabel("score, mean over tasks")
