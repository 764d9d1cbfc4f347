"""The figures of LD-Net, drawn from the finished cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.reproduction.ldnet.grid import LAYER_DROPOUT, NO_LM, Cell, pruned_cells
from secateur.reproduction.ldnet.results import Results
from secateur.support.figures import GREY, PALETTE, colors, figure, label_ends, legend, png, title_of

SIZE = (4.6, 3.2)
COLORS = dict(zip(LAYER_DROPOUT, PALETTE[:2], strict=True))


def draw(results: Results, environment: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the figures; return PNG data by file name. `environment`: that of the run."""
    settings = results.settings
    examples = f"{settings.examples or 'all'} sentences to train on, {settings.tested or 'all'} to evaluate on"

    def title(what: str) -> str:
        return title_of("LD-Net", examples, environment, what)

    return {
        "gates.png": _gates(results, title(f"gates z, {settings.wanted[0]} layers wanted")),
        "layers.png": _layers(results, title("F1 by the layers left")),
    }


def _gates(results: Results, title: str) -> bytes:
    """Draw each layer's gate z over the training with the penalty, at the smallest number of layers wanted.

    There is a row for each task and a column for each kind of language models.
    """
    settings = results.settings
    drawing, grid = figure(
        len(settings.columns), len(LAYER_DROPOUT), SIZE, title=title, share_x=True, share_y=True,
        caption="One training run each; no error bars. Solid, f: layers of the forward language model; dashed, b: backward.",
    )  # fmt: skip
    names = [f"{direction}{number}" for direction in "fb" for number in range(1, settings.layers + 1)]
    color_of = dict(zip(names, colors(len(names)), strict=True))
    for task, row in zip(settings.columns, grid, strict=True):
        for lm, axes in zip(LAYER_DROPOUT, row, strict=True):
            # [log entries, layers]; all gates start at 1.
            z = [[1.0] * 2 * settings.layers, *results.row(Cell(lm, task, settings.wanted[0]))["gates"]]
            epochs = [settings.prune_epochs * k / (len(z) - 1) for k in range(len(z))]
            axes.set_ylim(-0.03, 1.03)
            ends = []
            for name, curve in zip(names, zip(*z, strict=True), strict=True):
                style = "-" if name.startswith("f") else "--"
                axes.plot(epochs, curve, style, color=color_of[name], linewidth=1, label=name)
                ends.append((epochs[-1], curve[-1], name, color_of[name]))
            label_ends(axes, ends)
            axes.set_title(f"{task}, language models: {lm}", fontsize=9)
            axes.set_xlabel("epochs with the penalty")
            axes.set_ylabel("gate z (0: the layer is removed)")
    return png(drawing)


def _layers(results: Results, title: str) -> bytes:
    """Draw the metric against the layers left, for each task: detached at random without training, or closed by the penalty."""
    settings = results.settings
    drawing, (row,) = figure(
        1, len(settings.columns), SIZE, title=title, share_x=True, share_y=True,
        caption=f"Lines: layers detached at random without training, mean over {settings.draws} orders. Points (R3): layers "
        "closed by the penalty; error bars: 95% intervals.",
    )  # fmt: skip
    for task, axes in zip(settings.columns, row, strict=True):
        for number, (lm, color) in enumerate(COLORS.items()):
            detached = [(left, 100 * score) for left, score in results.row(Cell(lm, task))["detached"]]
            axes.plot(*zip(*detached, strict=True), color=color, label=f"detached, {lm}")
            rows = [results.row(cell) for cell in pruned_cells(settings, task) if cell.lm == lm]
            scores, lows, highs = ([100 * pruned[f"dev{end}"] for pruned in rows] for end in ("", "_low", "_high"))
            bars = [
                [score - low for score, low in zip(scores, lows, strict=True)],
                [high - score for score, high in zip(scores, highs, strict=True)],
            ]
            # A little beside each other, so that no error bar hides another one.
            places = [pruned["layers"] + 0.4 * (number - 0.5) for pruned in rows]
            axes.errorbar(
                places, scores, yerr=bars, fmt="o", color=color, markeredgecolor="black", capsize=2, label=f"R3, {lm}"
            )  # fmt: skip
        axes.axhline(100 * results.row(Cell(NO_LM, task))["dev"], color=GREY, linestyle=":", label=NO_LM)
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("layers left")
        axes.set_ylabel("F1 in percent (--eval)")
    legend(drawing)
    return png(drawing)
