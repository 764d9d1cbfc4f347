"""The tables of docs/results/compatibility.md: one cell for each way of running and each pruned folder that it was tried on."""

from __future__ import annotations

from bench.compatibility.attempt import WAYS
from bench.compatibility.folder import SHAPES
from bench.support.tables import markdown, result

WIDTHS = {
    "uniform": "the same in all layers",
    "heads": "heads and neurons differ by layer",
    "channels": "channels differ by head",
}


def compatibility_versions() -> str:
    run = result("compatibility")
    versions = ", ".join(f"{name} {number or '(not installed)'}" for name, number in run["versions"].items())
    return f"On a CPU ({run['machine']}), one thread, Python {run['python']}: {versions}."


def compatibility_t5() -> str:
    return _table("t5", "T5")


def compatibility_bert() -> str:
    return _table("bert", "BERT")


def compatibility_llama() -> str:
    return _table("llama", "Llama")


def _table(family: str, title: str) -> str:
    rows = []
    for name, cells in result("compatibility")["outcomes"].items():
        of = [cells[f"{family}-{shape}"] for shape in SHAPES]
        if any(cell["verdict"] != "not applicable" for cell in of):
            rows.append([WAYS[name].title, *(_cell(cell["verdict"], cell["note"]) for cell in of)])
    return markdown([f"{title}; widths are", *(WIDTHS[shape] for shape in SHAPES)], rows)


def _cell(verdict: str, note: str) -> str:
    return f"**{verdict}**: " + note.replace("|", "\\|")
