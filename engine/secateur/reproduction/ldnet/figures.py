"""The figures of LD-Net, drawn from the finished cells."""

from __future__ import annotations

from typing import Any

from secateur.reproduction.ldnet.grid import LAYER_DROPOUT, NO_LM, Cell, pruned_cells
from secateur.reproduction.ldnet.results import Results
from secateur.support.figures import figure, png

SIZE = (4.6, 3.2)
COLORS = dict(zip(LAYER_DROPOUT, ("C0", "C1"), strict=True))


def draw(results: Results) -> dict[str, bytes]:
    """Draw the figures; return PNG data by file name."""
    return {"gates.png": _gates(results), "layers.png": _layers(results)}


def _gates(results: Results) -> bytes:
    """Draw each layer's gate z over the training with the penalty, at the smallest number of layers wanted.

    There is a row for each task and a column for each kind of language models.
    """
    settings = results.settings
    drawing, grid = figure(len(settings.columns), len(LAYER_DROPOUT), SIZE)
    for task, row in zip(settings.columns, grid, strict=True):
        for lm, axes in zip(LAYER_DROPOUT, row, strict=True):
            # [log entries, layers]; all gates start at 1.
            z = [[1.0] * 2 * settings.layers, *results.row(Cell(lm, task, settings.wanted[0]))["gates"]]
            epochs = [settings.prune_epochs * k / (len(z) - 1) for k in range(len(z))]
            for number, curve in enumerate(zip(*z, strict=True)):
                style = "-" if number < settings.layers else "--"
                axes.plot(epochs, curve, style, color=f"C{number % settings.layers % 10}", linewidth=1)
            axes.set_title(f"{task}, {lm}, {settings.wanted[0]} wanted (forward -, backward --)", fontsize=8)
            axes.set_xlabel("epochs with the penalty")
            axes.set_ylabel("z")
            axes.grid(alpha=0.3)
    return png(drawing)


def _layers(results: Results) -> bytes:
    """Draw the metric against the layers left, for each task: detached at random without training, or closed by the penalty."""
    settings = results.settings
    drawing, (row,) = figure(1, len(settings.columns), SIZE)
    for task, axes in zip(settings.columns, row, strict=True):
        for lm, color in COLORS.items():
            axes.plot(*_percent(results.row(Cell(lm, task))["detached"]), color=color, label=f"detached, {lm}")
            pruned_rows = [results.row(cell) for cell in pruned_cells(settings, task) if cell.lm == lm]
            points = _percent([[pruned_row["layers"], pruned_row["dev"]] for pruned_row in pruned_rows])
            axes.plot(*points, "o", color=color, markeredgecolor="black", label=f"R3, {lm}")
        axes.axhline(100 * results.row(Cell(NO_LM, task))["dev"], color="grey", linestyle=":", label=NO_LM)
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("layers left")
        axes.set_ylabel("F1 (--eval)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return png(drawing)


def _percent(points: Any) -> tuple[list[float], list[float]]:
    """Split (layers left, score) pairs into two lists, with scores in percent."""
    return [left for left, _ in points], [100 * score for _, score in points]
