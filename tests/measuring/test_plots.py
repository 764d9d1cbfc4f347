"""Plots of benchmarks, plans, sweeps and gates: titles, captions, limits, colours and labels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from cases import random_scores
from figure_facts import assert_readable, figures_of, limits

import secateur
from secateur.cli.shared import plots as cli_plots
from secateur.flow.sweep import Point
from secateur.measuring import plots
from secateur.measuring.benchmark import Report, Timing
from secateur.support.figures import colors

ENVIRONMENT = {"device": "CPU (x86_64)", "threads": 2, "dtype": "float32"}


def test_a_benchmark_tells_pairs_quartiles_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_of(monkeypatch, plots)
    timings = [Timing(size, 64, 10.0, 5.0, 2.0, 1.9, 2.2, 100, 40, 20) for size in (1, 32)]
    plots.benchmark_plot(Report(timings, 10, 5, ENVIRONMENT, []), "folder, text-to-text: dense against pruned")
    (figure,) = figures
    assert_readable(
        figure, ("folder, text-to-text", "n = 20 pairs", "CPU (x86_64)"), ("error bars: quartiles", "2 threads, float32")
    )
    (axes,) = figure.axes
    assert axes.get_ylim() == pytest.approx((0, 1.1 * 2.5))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 x 64", "32 x 64"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FLOPs allow", "dense", "measured"]


def test_widths_have_one_colour_a_kind_and_equal_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_of(monkeypatch, plots)
    plan = secateur.plan(random_scores("t5-gated", "channel"), flops=0.5, allocation="knapsack")
    plots.widths_plot(plan, "folder, text-to-text: what each layer keeps")
    (figure,) = figures
    assert_readable(figure, ("folder, text-to-text",), ("at most 50.0% of the layers' FLOPs", "knapsack"))
    assert limits(figure) == [(-0.03, 1.03)] * 2
    by_kind: dict[str, set[Any]] = {}
    for line in (line for axes in figure.axes for line in axes.lines):
        by_kind.setdefault(line.get_label(), set()).add(line.get_color())
    assert all(len(of_kind) == 1 for of_kind in by_kind.values())
    assert len(set.union(*by_kind.values())) == len(by_kind) == 5


@pytest.mark.parametrize("kind", ["keep", "flops", "speedup"])
def test_a_sweep_has_equal_axes_and_tells_its_intervals(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_of(monkeypatch, cli_plots)
    amounts = (1.0, 1.5, 2.0) if kind == "speedup" else (1.0, 0.8, 0.5)
    points = []
    for k, amount in enumerate(amounts):
        value, speedup = 0.8 - 0.1 * k, 1.0 + k
        interval, quartiles = (value - 0.1, value + 0.05), (speedup - 0.1, speedup + 0.2)
        points.append(Point(kind, amount, "accuracy", value, *interval, 40, 10, 10, 5.0, speedup, *quartiles, 9.0))
    cli_plots.sweep_plot(points, "folder, text-to-text", ENVIRONMENT, (32, 64))
    (figure,) = figures
    words = ("95% intervals of the accuracy on 40 examples", "quartiles of the speed-up", "batch 32 x 64 tokens")
    assert_readable(figure, ("folder, text-to-text", "n = 40", "CPU (x86_64)"), words)
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert left.xaxis_inverted() == (kind != "speedup")
    assert [text.get_text() for text in right.texts] == [f"{amount:g}" for amount in amounts[1:]] + ["dense"]


@pytest.mark.parametrize("count", [3, 24])
def test_gates_are_named_at_the_ends_of_their_lines(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_of(monkeypatch, cli_plots)
    gates = {f"encoder.{number}": [1.0, 0.5, 0.0 if number else 1.0] for number in range(count)}
    cli_plots.gates_plot({"step": [1, 2, 3], "z": gates}, "folder, text-to-text (n = 8, CPU)", "One training run.")
    (figure,) = figures
    assert_readable(figure, ("n = 8, CPU",), ("One training run",))
    (axes,) = figure.axes
    assert axes.get_ylim() == (-0.03, 1.03)
    assert sorted(text.get_text() for text in axes.texts) == sorted(gates)
    places = sorted(text.xyann[1] for text in axes.texts)
    assert min(high - low for low, high in pairwise(places)) > 0.02  # No name covers another one.
    assert places[-1] <= 1.03
    assert {text.get_text(): text.get_color() for text in axes.texts} == {
        line.get_label(): line.get_color() for line in axes.lines
    }


@pytest.mark.parametrize("count", [1, 10, 11, 40])
def test_colours_differ(count: int) -> None:
    assert len(set(colors(count))) == count
