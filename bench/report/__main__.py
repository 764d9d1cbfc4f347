"""Fills the tables of README.md and docs/ from bench/results/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.report.budgets import budgets, budgets_plot, latency, pruning
from bench.report.compatibility import (
    COMPATIBILITY_PAGE,
    compatibility_bert,
    compatibility_llama,
    compatibility_t5,
    compatibility_versions,
)
from bench.report.corpus import corpus
from bench.report.integrated import integrated_nodes, integrated_plot, integrated_speed
from bench.report.layers import LAYERS_PAGE, layers, layers_speed
from bench.report.multitask import multitask, multitask_speed
from bench.report.quality import demo, quality, recovery, speed, worth
from bench.report.real import REAL_PAGE, real_models, real_proofs, real_steps
from bench.report.reproduction import PAGE, reproduction, reproduction_ldnet, reproduction_multitask, reproduction_plots
from bench.report.routing import routing
from bench.support.provenance import ROOT

Maker = Callable[[], str]

# Every page with generated parts, and the functions that make the parts.
PAGES: tuple[tuple[Path, tuple[Maker, ...]], ...] = (
    (
        ROOT / "README.md",
        (
            demo, budgets, pruning, latency, quality, integrated_speed, integrated_nodes, worth, recovery, speed, routing,
            multitask, multitask_speed, corpus, real_models,
        ),
    ),
    (PAGE, (reproduction, reproduction_multitask, reproduction_ldnet)),
    (LAYERS_PAGE, (layers, layers_speed)),
    (REAL_PAGE, (real_steps, real_proofs)),
    (COMPATIBILITY_PAGE, (compatibility_versions, compatibility_t5, compatibility_bert, compatibility_llama)),
)  # fmt: skip


def main() -> None:
    """Write all pages and all figures."""
    integrated_plot()
    budgets_plot()
    reproduction_plots()
    for path, makers in PAGES:
        path.write_text(filled(path, *makers))


def filled(path: Path, *makers: Maker) -> str:
    """Return a page's text with what each maker returns between the marks of the maker's name. Nothing is written.

    Raises:
        ValueError: The page lacks a maker's marks.
    """
    text = path.read_text()
    for make in makers:
        name = make.__name__
        before, begin, rest = text.partition(f"<!-- begin:{name} -->")
        _, end, after = rest.partition(f"<!-- end:{name} -->")
        if not begin or not end:
            raise ValueError(f"{path}: expected the marks of {name}, got none")
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    main()
