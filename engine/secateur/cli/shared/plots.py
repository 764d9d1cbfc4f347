"""Plots of sweeps and of training, as PNG files in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.flow.sweep import Point
from secateur.measuring.plots import machine
from secateur.support.figures import GREY, PALETTE, colors, figure, label_ends, png

_AMOUNTS = {
    "keep": "share of units kept at every site",
    "flops": "share of the layers' FLOPs allowed",
    "params": "share of the layers' parameters allowed",
    "memory": "share of all weights allowed",
    "speedup": "speed-up asked for, as predicted",
}


def sweep_plot(points: Sequence[Point], title: str, environment: Mapping[str, Any], shape: tuple[int, int]) -> bytes:
    """Plot the metric, with its interval, against the budget and against the measured speed-up.

    Args:
        points: The points of a sweep, the dense model's first.
        title: The model, the task and how it was pruned.
        environment: The environment of the timing.
        shape: Examples and tokens of the timed batch.
    """
    dense, kind = points[0], points[0].budget
    ordered = sorted(points, key=lambda point: point.amount, reverse=kind != "speedup")
    plot, ((left, right),) = figure(
        1, 2, (4.8, 3.8), title=f"{title} (n = {dense.examples}, {environment['device']})", share_y=True,
        caption=f"Vertical bars: 95% intervals of the {dense.metric} on {dense.examples} examples. Horizontal bars: "
        f"quartiles of the speed-up. Numbers at points: the budget. Speed-up of {machine(environment, *shape)}.",
    )  # fmt: skip
    values = [point.value for point in ordered]
    errors = [[p.value - p.low for p in ordered], [p.high - p.value for p in ordered]]
    quartiles = [[p.speedup - p.speedup_low for p in ordered], [p.speedup_high - p.speedup for p in ordered]]
    style: dict[str, Any] = {"yerr": errors, "marker": "o", "color": PALETTE[0], "capsize": 2, "linewidth": 1.5}
    left.errorbar([point.amount for point in ordered], values, **style)
    right.errorbar([point.speedup for point in ordered], values, xerr=quartiles, **style)
    for point in ordered[1:]:
        place = (point.speedup, point.high)
        right.annotate(f"{point.amount:g}", place, (0, 3), textcoords="offset points", ha="center", fontsize=7)
    for axes, label in ((left, _AMOUNTS[kind]), (right, "measured speed-up (dense time / pruned time)")):
        axes.axhline(dense.value, color=GREY, linestyle=":", linewidth=1)
        axes.text(1.01, dense.value, "dense", color=GREY, fontsize=7, va="center", transform=axes.get_yaxis_transform())
        axes.margins(y=0.1)  # Room for the numbers above the error bars.
        axes.set_xlabel(label)
        axes.set_ylabel(dense.metric)
    if kind != "speedup":
        left.invert_xaxis()
    return png(plot)


def gates_plot(training: Mapping[str, Any], title: str, caption: str = "") -> bytes:
    """Plot each layer's gate over the steps of training, with the layer's name at the end of its line.

    Args:
        training: "step" [logged steps], and "z" with a list [logged steps] for each layer.
        title: The plot's title.
        caption: The text below.
    """
    plot, ((axes,),) = figure(1, 1, (6.4, max(3.8, 0.16 * len(training["z"]))), title=title, caption=caption)
    steps, gates = training["step"], training["z"]
    axes.set_ylim(-0.03, 1.03)
    ends = []
    for (name, values), color in zip(gates.items(), colors(len(gates)), strict=True):
        axes.plot(steps, values, linewidth=1.5, color=color, label=name)
        ends += [(steps[-1], values[-1], name, color)] if steps else []
    axes.set_xlabel("training step")
    axes.set_ylabel("gate (1 keeps the layer, 0 removes it)")
    label_ends(axes, ends)
    return png(plot)
