"""Matplotlib figures that need no display, and their PNG bytes."""

from __future__ import annotations

import io
from typing import Any


def figure(rows: int, columns: int, size: tuple[float, float] = (4.6, 3.6)) -> tuple[Any, Any]:
    """Create a figure that needs no display.

    Args:
        rows: The number of rows of axes.
        columns: The number of columns of axes.
        size: The width and height of one of the axes, in inches.

    Returns:
        The figure, and its axes as an array [rows, columns].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas_figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(canvas_figure)
    return canvas_figure, canvas_figure.subplots(rows, columns, squeeze=False)


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
