"""Plots of a benchmark and of a plan, as PNG files in memory."""

from __future__ import annotations

from typing import Any

from secateur.measuring.benchmark import Report
from secateur.planning.plan import Plan
from secateur.support.figures import figure, png

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9772b", "#8a8a8a"


def benchmark_plot(report: Report, title: str) -> bytes:
    """Plot the measured speed-up with its quartiles, and the speed-up that the FLOPs allow, for each batch shape."""
    plot, (axes,) = row_of_axes(1)
    timings = report.timings
    xs = range(len(timings))
    speedups = [t.speedup for t in timings]
    errors = [[t.speedup - t.speedup_low for t in timings], [t.speedup_high - t.speedup for t in timings]]
    axes.bar(xs, speedups, yerr=errors, color=_BLUE, capsize=2, width=0.6, label="measured")
    axes.plot(xs, [t.flops_speedup for t in timings], "_", color=_ORANGE, markersize=24, markeredgewidth=2, label="FLOPs allow")
    axes.axhline(1, color=_GREY, linewidth=1)
    axes.set_xticks(list(xs), [f"{t.batch_size} x {t.length}" for t in timings], rotation=30)
    axes.set_xlabel("batch size x tokens")
    axes.set_ylabel("dense / pruned time")
    axes.legend()
    plot.suptitle(title)
    return png(plot)


def widths_plot(plan: Plan, title: str) -> bytes:
    """Plot the share of units that each site keeps by layer: a panel for each stack, a line for each kind of site."""
    stacks = list(dict.fromkeys(site.stack for site in plan.sites))
    plot, grid = row_of_axes(len(stacks))
    for stack, axes in zip(stacks, grid, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for site in plan.sites:
            if site.stack == stack:
                kind = site.name.split(".", 2)[2].replace("_", " ")
                lines.setdefault(kind, []).append((site.layer, len(plan[site.name]) / site.units))
        for kind, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", linewidth=1.5, label=kind)
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(f"{stack} layer")
        axes.set_ylabel("share of units kept")
        axes.legend(fontsize=7)
    plot.suptitle(title)
    return png(plot)


def row_of_axes(count: int) -> tuple[Any, Any]:
    """A figure, and its axes in a row [count], with a grid and without a frame."""
    plot, grid = figure(1, count)
    for axes in grid[0]:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return plot, grid[0]
