"""Matplotlib figures that need no display: titles, captions, legends, labels and colours, and their PNG bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

# Colours that readers with colour blindness tell apart (Okabe and Ito 2008), then others that differ from them.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d3a9b", "#8c564b", "#000000", "#7f7f7f")
GREY = "#8a8a8a"
MARKERS = "osD^vP*XhH<>"


def colors(count: int) -> list[str]:
    """Return that many different colours. Where the palette has too few, they are evenly spaced on a colour map."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if count <= len(PALETTE):
        return list(PALETTE[:count])
    spaced = (colormaps["turbo"](0.03 + 0.94 * number / (count - 1)) for number in range(count))
    return [to_hex((0.8 * red, 0.8 * green, 0.8 * blue)) for red, green, blue, _ in spaced]  # Yellow is too light for lines.


def figure(
    rows: int,
    columns: int,
    size: tuple[float, float] = (4.6, 3.6),
    *,
    title: str = "",
    caption: str = "",
    share_x: bool | Literal["row"] = False,
    share_y: bool | Literal["row"] = False,
) -> tuple[Any, Any]:
    """Create a figure that needs no display.

    Args:
        rows: The number of rows of axes.
        columns: The number of columns of axes.
        size: The width and height of one of the axes, in inches.
        title: The line above all axes.
        caption: The small text below all axes. It says what error bars are and how the figure was measured.
        share_x: Whether all axes have the same limits of x; "row" for the axes of a row.
        share_y: Whether all axes have the same limits of y; "row" for the axes of a row.

    Returns:
        The figure, and its axes as an array [rows, columns].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas_figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(canvas_figure)
    letters = int(17 * size[0] * columns)  # Letters of the caption's size in the figure's width.
    if title:
        canvas_figure.suptitle("\n".join(textwrap.wrap(title, int(0.75 * letters), break_on_hyphens=False)), fontsize=10)
    if caption:
        canvas_figure.supxlabel("\n".join(textwrap.wrap(caption, letters, break_on_hyphens=False)), fontsize=7, color="#444444")
    grid = canvas_figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y)
    for axes in grid.flat:
        axes.tick_params(labelleft=True, labelbottom=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return canvas_figure, grid


def title_of(model: str, examples: str, environment: Mapping[str, Any], what: str) -> str:
    """Return the title of a figure: the model, what is drawn, the number of examples, and the device."""
    return f"{model}: {what} (n = {examples}, {environment['device']})"


def legend(figure: Any) -> None:
    """Put one legend with the labels of all axes on the right of the figure, where it covers nothing."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=7, frameon=False)


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the names of lines at their right ends, moved apart where they would overlap.

    The limits of y must be final.

    Args:
        axes: The axes.
        ends: The x and y of each line's end, its name and its colour.
    """
    if not ends:
        return
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    rows = axes.get_subplotspec().get_geometry()[0]
    step = (high - low) * 0.095 / (0.72 * axes.figure.get_figheight() / rows)  # The height of a line of these letters.
    ordered = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, y, *_ in ordered:
        places.append(max(y, places[-1] + step) if places else y)
    for number in reversed(range(len(places))):  # Names that would stand above the axes move down, and those below them too.
        places[number] = min(places[number], high - step * (len(places) - 1 - number))
    for (x, y, name, color), place in zip(ordered, places, strict=True):
        axes.annotate(
            name, (x, y), (right + 0.02 * (right - left), place), fontsize=6, color=color, ha="left", va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": color, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def png(figure: Any) -> bytes:
    """Draw a figure.

    Args:
        figure: The figure.

    Returns:
        The bytes of a PNG file.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
