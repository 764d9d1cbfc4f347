"""The tables of docs/results/layers.md, from bench/results/layers.json."""

from __future__ import annotations

from typing import Any

from bench.support.tables import markdown, result


def layers() -> str:
    """The metric by number of layers and by what deleted the others, a table for each study."""
    run = result("layers")
    parts = []
    for name, title in run["studies"].items():
        rows = [row for row in run["rows"] if row["study"] == name]
        cells = [
            (row["method"], str(row["keep"]), _metric(row), f"{row['parameters'] / 1e6:.2f} M", _deleted(row)) for row in rows
        ]
        speeds = ", ".join(_speed(row) for row in run["speeds"] if row["study"] == name)
        parts.append(
            f"{title}: {rows[0]['metric']} with its 95% interval on {rows[0]['examples']} examples.\n\n"
            f"{markdown(('', 'layers', rows[0]['metric'], 'parameters', 'deleted'), cells)}\n\n"
            f"Speed-up of 32 x 64 tokens, deleted by influence: {speeds}."
        )
    return "\n\n".join(parts)


def layers_speed() -> str:
    """A training step with gates over the same step without."""
    run = result("layers")
    names = {"builtin-t5": "the built-in T5", "minilm-shape": "BERT, 6 layers (the shape of all-MiniLM-L6-v2)"}
    rows = [
        (names[row["model"]], "the gates" if row["frozen"] else "gates and weights", _ratio(row["gated_over_plain"]))
        for row in run["steps"]
    ]
    about = run["environment"]
    return (
        "A training step with gates over the same step of the same model without them: batches of 32 x 64 tokens, CPU time of "
        f"one thread ({about['device']}, torch {about['torch']}), medians of interleaved ratios and their quartiles. Where the "
        "gates alone learn, the step without them goes back to the embeddings too.\n\n"
        + markdown(("model", "what learns", "with gates / without"), rows)
    )


def _metric(row: dict[str, Any]) -> str:
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _deleted(row: dict[str, Any]) -> str:
    return ", ".join(row.get("deleted", ()))


def _speed(row: dict[str, Any]) -> str:
    quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
    return f"with {row['keep']} layers {row['speedup']:.2f}x ({quartiles}; FLOPs allow {row['flops']:.2f}x)"


def _ratio(measured: dict[str, Any]) -> str:
    low, high = measured["quartiles"]
    return f"{measured['median']:.3f} ({low:.3f} to {high:.3f})"
