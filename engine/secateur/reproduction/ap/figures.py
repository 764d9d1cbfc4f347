"""The figures of attribution-based pruning, drawn from the finished cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from secateur.reproduction.ap.grid import STACKS, Settings
from secateur.reproduction.ap.results import Mean, Results
from secateur.support.figures import figure, png

SIZE = (4.2, 3.1)
# From a stack to the label of each line and the fields of its cells.
Lines = Callable[[str], list[tuple[str, dict[str, Any]]]]


def draw(results: Results, settings: Settings) -> dict[str, bytes]:
    """Draw a figure for each experiment of the run.

    Args:
        results: The finished cells.
        settings: The run's settings.

    Returns:
        PNG data by file name.
    """
    curves = partial(_curves, results)
    labels = {"ap": "with labels", "ap-unsupervised": "without labels"}
    sizes = {size: f"{size} examples" for size in settings.sizes} | {0: "as many as elsewhere"}
    drawings: dict[str, Callable[[], bytes]] = {
        "accuracy": lambda: curves(
            settings.tasks, settings.rates, lambda stack: [(name, {"criterion": name}) for name in settings.criteria]
        ),
        "both": lambda: _heat_maps(results, settings),
        "low-resource": lambda: curves(
            settings.detailed, settings.coarse, lambda stack: [(label, {"examples": size}) for size, label in sizes.items()]
        ),
        "unsupervised": lambda: curves(
            settings.tasks, settings.rates, lambda stack: [(label, {"criterion": name}) for name, label in labels.items()]
        ),
        "unseen": lambda: curves(
            settings.unseen[:1], settings.rates,
            lambda stack: [(f"scores of {scored}", {"scored": scored}) for scored in settings.unseen],
        ),
        "layers": lambda: curves(
            settings.detailed, settings.coarse,
            lambda stack: [(f"layers {w}" if w[0].isdigit() else w, {"sites": w}) for w in settings.parts(stack)],
        ),
    }  # fmt: skip
    return {f"{name}.png": drawings[name]() for name in settings.experiments}


def _curves(results: Results, tasks: Sequence[str], rates: Sequence[float], lines: Lines) -> bytes:
    """Draw accuracy against rate: a row for each task, a column for each stack, and a line for each label.

    A line starts at the dense model's accuracy. Error bars are standard deviations over the draws.
    """
    drawing, grid = figure(len(tasks), len(STACKS), SIZE)
    # If both stacks have the same labels, the figure has one legend.
    same_labels = len({tuple(label for label, _ in lines(stack)) for stack in STACKS}) == 1
    for task, row in zip(tasks, grid, strict=True):
        for stack, axes in zip(STACKS, row, strict=True):
            for number, (label, cell) in enumerate(lines(stack)):
                curve = results.curve(stack, rates, **{"scored": task, "tested": task, "criterion": "ap", **cell})
                _line(axes, results.dense(task), curve, label, number)
            axes.set_title(f"{task}, {stack} pruned", fontsize=9)
            axes.set_xlabel("share of units removed")
            axes.set_ylabel("accuracy")
            axes.grid(alpha=0.3)
            if not same_labels:
                axes.legend(fontsize=7)
    if same_labels:
        drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return png(drawing)


def _line(axes: Any, dense: float, curve: Sequence[tuple[float, Mean]], label: str, number: int) -> None:
    """Draw one line, from the dense model's accuracy at rate 0 on."""
    rates = [0.0, *(rate for rate, _ in curve)]
    values = [dense, *(mean.value for _, mean in curve)]
    bars = [0.0, *(mean.deviation for _, mean in curve)]
    style = ("-", "--", ":")[number // 8 % 3]
    axes.errorbar(rates, values, yerr=bars if any(bars) else None, marker="o", markersize=3, linestyle=style, label=label)


def _heat_maps(results: Results, settings: Settings) -> bytes:
    """Draw a heat map for each task: accuracy against the encoder's rate and the decoder's rate."""
    drawing, grid = figure(1, len(settings.tasks), SIZE)
    rates = (0.0, *settings.coarse)
    for axes, task in zip(grid[0], settings.tasks, strict=True):
        accuracies = [[_accuracy(results, task, encoder, decoder) for decoder in rates] for encoder in rates]
        image = axes.imshow(accuracies, origin="lower", cmap="Blues")
        for i, row in enumerate(accuracies):
            for j, value in enumerate(row):
                color = "white" if image.norm(value) > 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
        axes.set_xticks(range(len(rates)), rates)
        axes.set_yticks(range(len(rates)), rates)
        axes.set_xlabel("decoder's rate")
        axes.set_ylabel("encoder's rate")
        axes.set_title(task, fontsize=9)
    return png(drawing)


def _accuracy(results: Results, task: str, encoder: float, decoder: float) -> float:
    """Return the accuracy at a pair of rates; NaN if the cell is not finished."""
    if not encoder and not decoder:
        return results.dense(task)
    mean = results.at(scored=task, tested=task, criterion="ap", encoder=encoder, decoder=decoder)
    return float("nan") if mean is None else mean.value
