"""Plots of a benchmark and of a plan, as PNG files in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.measuring.benchmark import Report
from secateur.model.sites import by_group
from secateur.planning.plan import Plan
from secateur.support.figures import GREY, MARKERS, PALETTE, colors, figure, legend, png


def model_name(model: Any) -> str:
    """Return the name of a model for a title: the Hub name or the folder that it was loaded from, else its class."""
    name = getattr(model.config, "name_or_path", "")
    return "/".join(Path(name).parts[-2:]).removeprefix("/") if name else type(model).__name__


def machine(environment: Mapping[str, Any], *shape: int) -> str:
    """Return the device, the threads and the dtype of a measurement in words, with the batch size and tokens if given."""
    batch = f"batch {' x '.join(map(str, shape))} tokens, " if shape else ""
    threads = environment["threads"]
    return f"{batch}{environment['device']}, {threads} thread{'s' * (threads != 1)}, {environment['dtype']}"


def benchmark_plot(report: Report, title: str) -> bytes:
    """Plot the measured speed-up with its quartiles, and the speed-up that the FLOPs allow, for each batch shape."""
    timings = report.timings
    pairs = sorted({t.pairs for t in timings})
    counts = f"{pairs[0]} to {pairs[-1]}" if len(pairs) > 1 else f"{pairs[0]}"
    plot, ((axes,),) = figure(
        1, 1, (max(5.6, 2.2 + 0.8 * len(timings)), 3.8),
        title=f"{title} (n = {counts} pairs, {report.environment['device']})",
        caption=f"Bars: median of {counts} pairs of passes in turn; error bars: quartiles. {machine(report.environment)}.",
    )  # fmt: skip
    xs = range(len(timings))
    speedups = [t.speedup for t in timings]
    errors = [[t.speedup - t.speedup_low for t in timings], [t.speedup_high - t.speedup for t in timings]]
    axes.bar(xs, speedups, yerr=errors, color=PALETTE[0], ecolor="#222222", capsize=3, width=0.6, label="measured")
    axes.plot(
        xs, [t.flops_speedup for t in timings], "_", color=PALETTE[1], markersize=24, markeredgewidth=2, label="FLOPs allow"
    )
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":", label="dense")
    axes.set_xticks(list(xs), [f"{t.batch_size} x {t.length}" for t in timings], rotation=30 if len(timings) > 4 else 0)
    axes.set_ylim(0, 1.1 * max(*(t.speedup_high for t in timings), *(t.flops_speedup for t in timings), 1.0))
    axes.set_xlabel("batch size x tokens")
    axes.set_ylabel("speed-up (dense time / pruned time)")
    legend(plot)
    return png(plot)


def widths_plot(plan: Plan, title: str) -> bytes:
    """Plot the share of units that each site keeps by layer: a panel for each stack, a line for each kind of site."""
    stacks = list(dict.fromkeys(site.stack for site in plan.sites))
    groups = by_group(plan.sites)
    kinds = list(dict.fromkeys(group.partition(" ")[2] for group in groups))
    style = {
        kind: (color, MARKERS[k % len(MARKERS)]) for k, (kind, color) in enumerate(zip(kinds, colors(len(kinds)), strict=True))
    }
    budget = "" if plan.budget is None else f"Budget: {plan.budget}. "
    spread = "" if plan.spread is None else f"Allocation {plan.spread.allocation}, floor {plan.spread.floor:.2g}."
    removed = f" Removed blocks: {', '.join(plan.removed_blocks)}." if plan.removed_blocks else ""
    plot, (row,) = figure(1, len(stacks), title=title, caption=f"{budget}{spread}{removed}", share_y=True)
    for stack, axes in zip(stacks, row, strict=True):
        for group, sites in groups.items():
            of_stack, _, kind = group.partition(" ")
            if of_stack == stack:
                color, marker = style[kind]
                shares = [len(plan[site.name]) / site.units for site in sites]
                axes.plot([site.layer for site in sites], shares, color=color, marker=marker, alpha=0.85, label=kind)
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(f"{stack} layer")
        axes.set_ylabel("share of units kept")
    legend(plot)
    return png(plot)
