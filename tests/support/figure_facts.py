"""Facts of every figure: a title, a caption, labelled axes, lines of different colours, no legend inside the axes."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.colors import to_hex


def figures_of(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[Any]:
    """Return a list that gets the figures that a module draws from now on."""
    figures: list[Any] = []
    draw = module.png

    def keep(figure: Any) -> bytes:
        figures.append(figure)
        content: bytes = draw(figure)
        return content

    monkeypatch.setattr(module, "png", keep)
    return figures


def assert_readable(figure: Any, title: tuple[str, ...], caption: tuple[str, ...] = ()) -> None:
    """Check the facts, and that the title and the caption say these words."""
    texts = {"title": figure.get_suptitle(), "caption": figure.get_supxlabel()}
    for name, words in (("title", title), ("caption", caption)):
        text = texts[name].replace("\n", " ")
        assert all(word in text for word in words), f"{name}: {text}"
    for axes in figure.axes:
        named = axes.get_xlabel() or axes.get_label() == "<colorbar>"
        assert named, "axes without a label of x"
        assert axes.get_ylabel(), "axes without a label of y"
        assert axes.get_legend() is None, "a legend inside the axes"
        named_lines = [line for line in axes.lines if len(line.get_xdata()) > 1 and line.get_label()[0] != "_"]
        named_lines += [bars.lines[0] for bars in axes.containers if hasattr(bars, "has_yerr") and bars.lines[0]]
        drawn = [to_hex(line.get_color()) for line in named_lines if line.get_linestyle() != "None"]
        assert len(set(drawn)) == len(drawn), f"a colour twice: {drawn}"


def limits(figure: Any) -> list[tuple[float, float]]:
    """Return the limits of y of all axes."""
    return [axes.get_ylim() for axes in figure.axes]
