"""The figures of attribution-based pruning, drawn from the finished cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from secateur.reproduction.ap.grid import STACKS, Settings
from secateur.reproduction.ap.results import Mean, Results
from secateur.support.figures import MARKERS, colors, figure, label_ends, legend, png, title_of

SIZE = (4.2, 3.1)
_MAPS = 3  # Heat maps in a row.
_FEW = 5  # More lines than that are named at their ends.
# From a stack to the label of each line and the fields of its cells.
Lines = Callable[[str], list[tuple[str, dict[str, Any]]]]


def draw(results: Results, settings: Settings, environment: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw a figure for each experiment of the run.

    Args:
        results: The finished cells.
        settings: The run's settings.
        environment: The environment of the run.

    Returns:
        PNG data by file name.
    """
    title = partial(title_of, settings.model, f"{settings.tested or 'all'} test examples of each task", environment)
    labels = {"ap": "with labels", "ap-unsupervised": "without labels"}
    sizes = {size: f"{size} examples" for size in settings.sizes} | {0: "as many as elsewhere"}

    def curves(what: str, tasks: Sequence[str], rates: Sequence[float], lines: Lines) -> bytes:
        return _curves(results, title(what), settings.draws, tasks, rates, lines)

    drawings: dict[str, Callable[[], bytes]] = {
        "accuracy": lambda: curves(
            "criteria", settings.tasks, settings.rates,
            lambda stack: [(name, {"criterion": name}) for name in settings.criteria],
        ),
        "both": lambda: _heat_maps(results, settings, title("AP with both stacks pruned")),
        "low-resource": lambda: curves(
            "AP by the number of scored examples", settings.detailed, settings.coarse,
            lambda stack: [(label, {"examples": size}) for size, label in sizes.items()],
        ),
        "unsupervised": lambda: curves(
            "AP with and without labels", settings.tasks, settings.rates,
            lambda stack: [(label, {"criterion": name}) for name, label in labels.items()],
        ),
        "unseen": lambda: curves(
            "AP with scores of other tasks", settings.unseen[:1], settings.rates,
            lambda stack: [(f"scores of {scored}", {"scored": scored}) for scored in settings.unseen],
        ),
        "layers": lambda: curves(
            "AP on parts of a stack", settings.detailed, settings.coarse,
            lambda stack: [(f"layers {w}" if w[0].isdigit() else w, {"sites": w}) for w in settings.parts(stack)],
        ),
    }  # fmt: skip
    return {f"{name}.png": drawings[name]() for name in settings.experiments}


def _curves(results: Results, title: str, draws: int, tasks: Sequence[str], rates: Sequence[float], lines: Lines) -> bytes:
    """Draw accuracy against rate: a row for each task, a column for each stack, and a line for each label.

    A line starts at the dense model's accuracy. Error bars are standard deviations over the draws.
    """
    drawing, grid = figure(
        len(tasks), len(STACKS), SIZE, title=title, share_x=True, share_y="row",
        caption=f"Error bars: standard deviation over at most {draws} draws; lines without bars have one draw. Lines begin at "
        "the dense model's accuracy.",
    )  # fmt: skip
    labels = list(dict.fromkeys(label for stack in STACKS for label, _ in lines(stack)))
    color_of = dict(zip(labels, colors(len(labels)), strict=True))
    for task, row in zip(tasks, grid, strict=True):
        ends: list[list[tuple[float, float, str, str]]] = []
        for stack, axes in zip(STACKS, row, strict=True):
            ends.append([])
            for label, cell in lines(stack):
                curve = results.curve(stack, rates, **{"scored": task, "tested": task, "criterion": "ap", **cell})
                marker = MARKERS[labels.index(label) % len(MARKERS)]
                end = _line(axes, results.dense(task), curve, label, color_of[label], marker)
                ends[-1].append((*end, label, color_of[label]))
            axes.set_title(f"{task}, {stack} pruned", fontsize=9)
            axes.set_xlabel("share of units removed")
            axes.set_ylabel("accuracy")
        if len(labels) > _FEW:  # The axes of a row share their limits, so names are placed when all lines are drawn.
            for axes, of_axes in zip(row, ends, strict=True):
                label_ends(axes, of_axes)
    if len(labels) <= _FEW:
        legend(drawing)
    return png(drawing)


def _line(
    axes: Any, dense: float, curve: Sequence[tuple[float, Mean]], label: str, color: str, marker: str
) -> tuple[float, float]:
    """Draw one line, from the dense model's accuracy at rate 0 on. Return the end of the line."""
    rates = [0.0, *(rate for rate, _ in curve)]
    values = [dense, *(mean.value for _, mean in curve)]
    bars = [0.0, *(mean.deviation for _, mean in curve)]
    errors = bars if any(bars) else None
    axes.errorbar(rates, values, yerr=errors, marker=marker, markersize=3.5, linewidth=1.2, capsize=2, color=color, label=label)
    return rates[-1], values[-1]


def _heat_maps(results: Results, settings: Settings, title: str) -> bytes:
    """Draw a heat map for each task: accuracy against the encoder's rate and the decoder's rate."""
    columns = min(len(settings.tasks), _MAPS)
    drawing, grid = figure(
        math.ceil(len(settings.tasks) / columns), columns, SIZE, title=title,
        caption="Numbers: accuracy. All maps have the same colours; one draw each.",
    )  # fmt: skip
    rates = (0.0, *settings.coarse)
    maps = {
        task: [[_accuracy(results, task, encoder, decoder) for decoder in rates] for encoder in rates]
        for task in settings.tasks
    }
    cells = [value for accuracies in maps.values() for row in accuracies for value in row if value == value]  # Without NaN.
    for axes, (task, accuracies) in zip(grid.flat, maps.items(), strict=False):
        image = axes.imshow(accuracies, origin="lower", cmap="Blues", vmin=min(cells), vmax=max(cells))
        for i, row in enumerate(accuracies):
            for j, value in enumerate(row):
                color = "white" if image.norm(value) > 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
        axes.grid(False)
        axes.set_xticks(range(len(rates)), rates)
        axes.set_yticks(range(len(rates)), rates)
        axes.set_xlabel("decoder's rate")
        axes.set_ylabel("encoder's rate")
        axes.set_title(task, fontsize=9)
    for axes in list(grid.flat)[len(maps) :]:
        axes.remove()
    drawing.colorbar(image, ax=list(grid.flat)[: len(maps)], label="accuracy", shrink=0.85)
    return png(drawing)


def _accuracy(results: Results, task: str, encoder: float, decoder: float) -> float:
    """Return the accuracy at a pair of rates; NaN if the cell is not finished."""
    if not encoder and not decoder:
        return results.dense(task)
    mean = results.at(scored=task, tested=task, criterion="ap", encoder=encoder, decoder=decoder)
    return float("nan") if mean is None else mean.value
