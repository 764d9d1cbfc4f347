"""Plots of sweeps and of training, as PNG files in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.flow.sweep import Point
from secateur.measuring.plots import row_of_axes
from secateur.support.figures import png

_BLUE, _GREY = "#1f5fa8", "#8a8a8a"


def sweep_plot(points: Sequence[Point], title: str) -> bytes:
    """Plot the metric, with its interval, against the share of units kept and against the measured speed-up."""
    plot, (left, right) = row_of_axes(2)
    ordered = sorted(points, key=lambda point: point.keep)
    values = [point.value for point in ordered]
    errors = [[p.value - p.low for p in ordered], [p.high - p.value for p in ordered]]
    for axes, xs, label in (
        (left, [point.keep for point in ordered], "share of units kept"),
        (right, [point.speedup for point in ordered], "measured speed-up"),
    ):
        axes.errorbar(xs, values, yerr=errors, marker="o", color=_BLUE, capsize=2, linewidth=1.5)
        axes.axhline(ordered[-1].value, color=_GREY, linestyle=":", linewidth=1)
        axes.set_xlabel(label)
        axes.set_ylabel(ordered[0].metric)
    left.invert_xaxis()
    plot.suptitle(title)
    return png(plot)


def gates_plot(training: Mapping[str, Any], title: str) -> bytes:
    """Plot each layer's gate over the steps of training.

    Args:
        training: "step" [logged steps], and "z" with a list [logged steps] for each layer.
        title: The plot's title.
    """
    plot, (axes,) = row_of_axes(1)
    for name, values in training["z"].items():
        axes.plot(training["step"], values, linewidth=1.5, label=name)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("step")
    axes.set_ylabel("gate")
    axes.legend(fontsize=7)
    plot.suptitle(title)
    return png(plot)
