"""The tables of engines on a CPU, and of what a shape costs in accuracy."""

from __future__ import annotations

from typing import Any

from bench.report.budgets import methods_table
from bench.support.tables import markdown, result

REFERENCE = "torch float32, dense"
SHAPES = {"stock": "stock over dense", "any": "any over dense"}


def engines() -> str:
    """Make a table for each model and batch: times of the dense model, and speed-ups by pruning and beside PyTorch."""
    run = result("engines")
    about = run["environment"]
    tables = [
        f"On {about['processor']}, {run['threads']} threads: torch {about['torch']}, transformers {about['transformers']}. "
        f"One forward pass of {run['rows'][0]['length']} tokens a text, medians of {run['rounds']} rounds in turn. Pruned: "
        f"{run['share']:g} of the layers' FLOPs are left. \"Over dense\": the dense model's time over the pruned one's in the "
        "same engine. \"Over PyTorch\": the time of the dense model in PyTorch over that of the fastest shape in this engine."
    ]  # fmt: skip
    head = ("engine", "dense, ms", *SHAPES.values(), "over PyTorch")
    for row in run["rows"]:
        timed = [name.removesuffix("_ms") for name in row["times"] if name.endswith("_ms")]
        lines = [_line(engine, row["times"]) for engine in dict.fromkeys(name.rpartition(", ")[0] for name in timed)]
        texts = "1 text" if row["batch"] == 1 else f"{row['batch']} texts"
        tables.append(f"**{row['model']}, {texts}**\n\n{markdown(head, lines)}")
    reasons = dict.fromkeys(why for row in run["rows"] for why in row["missing"].values())
    if reasons:
        tables.append("A dash stands where the export refuses the shape.")
    return "\n\n".join(tables)


def _line(engine: str, times: dict[str, Any]) -> tuple[str, ...]:
    """The row of an engine."""

    def ratio(shape: str) -> float | None:
        """The time of a shape over that of the dense model in PyTorch."""
        name = f"{engine}, {shape}"
        if name == REFERENCE:
            return 1.0
        entry = times.get(f"{name}_over_{REFERENCE}")
        return None if entry is None else float(entry["median"])

    dense = ratio("dense")
    known = [value for shape in ("dense", *SHAPES) if (value := ratio(shape)) is not None]
    cells = ["-" if dense is None or (value := ratio(shape)) is None else f"{dense / value:.2f}x" for shape in SHAPES]
    milliseconds = times.get(f"{engine}, dense_ms")
    return engine, "-" if milliseconds is None else f"{milliseconds:.1f}", *cells, f"{1 / min(known):.2f}x"


def shapes() -> str:
    """Make the table of accuracy under a shape."""
    return methods_table("shapes", "shape", {"secateur": "any"})
