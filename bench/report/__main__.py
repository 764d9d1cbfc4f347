"""Fills the tables of README.md and docs/ from bench/results/, and the file tree from the files' first lines."""

from __future__ import annotations

import ast
import subprocess
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
from bench.report.reproduction import PAGE, reproduction, reproduction_ldnet, reproduction_multitask
from bench.report.routing import routing
from bench.support.provenance import ROOT
from bench.support.tables import markdown


def main() -> None:
    integrated_plot()
    budgets_plot()
    fill(
        ROOT / "README.md",
        demo,
        budgets,
        pruning,
        latency,
        quality,
        integrated_speed,
        integrated_nodes,
        worth,
        recovery,
        speed,
        routing,
        multitask,
        multitask_speed,
        corpus,
        real_models,
        tree,
    )
    fill(PAGE, reproduction, reproduction_multitask, reproduction_ldnet)
    fill(LAYERS_PAGE, layers, layers_speed)
    fill(REAL_PAGE, real_steps, real_proofs)
    fill(COMPATIBILITY_PAGE, compatibility_versions, compatibility_t5, compatibility_bert, compatibility_llama)


def fill(path: Path, *makers: Callable[[], str]) -> None:
    """Puts what each function returns between the marks with its name."""
    text = path.read_text()
    for make in makers:
        name = make.__name__
        before, _, rest = text.partition(f"<!-- begin:{name} -->")
        _, _, after = rest.partition(f"<!-- end:{name} -->")
        text = f"{before}<!-- begin:{name} -->\n{make()}\n<!-- end:{name} -->{after}"
    path.write_text(text)


def tree() -> str:
    """Files with the first sentence of their docstring or leading comment."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = []
    for name in sorted(listed.stdout.splitlines(), key=lambda n: ("/" not in n, n)):
        line = first_line(ROOT / name)
        if line:
            rows.append((f"`{name}`", line))
    return markdown(("file", "what lives there"), rows)


def first_line(path: Path) -> str | None:
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    if path.name == "Makefile":
        return path.read_text().split("\n")[0].lstrip("# ")
    return None


if __name__ == "__main__":
    main()
