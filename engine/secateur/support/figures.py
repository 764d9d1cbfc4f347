"""Figures that need no display, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any


def figure(rows: int, columns: int, size: tuple[float, float] = (4.6, 3.6)) -> tuple[Any, Any]:
    """A figure that needs no display, and its axes [rows, columns]; size: inches of one of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
