"""Fill the tables and the figures of README.md and docs/ from bench/results/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.report.budgets import budgets, budgets_plot, budgets_summary, efforts, latency, pruning
from bench.report.compatibility import (
    compatibility_bert,
    compatibility_llama,
    compatibility_t5,
    compatibility_versions,
)
from bench.report.corpus import corpus, prompts, runners
from bench.report.engines import engines, shapes
from bench.report.gpu import gpu, gpu_plot, gpu_summary
from bench.report.healing import healing, healing_probes
from bench.report.integrated import integrated_nodes, integrated_plot, integrated_speed
from bench.report.layers import layers, layers_speed
from bench.report.multitask import multitask, multitask_speed
from bench.report.quality import demo, quality, recovery, speed, startup, worth
from bench.report.real import real_models, real_proofs, real_steps
from bench.report.reproduction import (
    reproduction,
    reproduction_ldnet,
    reproduction_ldnet_plots,
    reproduction_multitask,
    reproduction_multitask_plots,
    reproduction_plots,
)
from bench.report.routing import routing
from bench.support.provenance import ROOT

Maker = Callable[[], str]
Drawer = Callable[[], dict[str, bytes]]

# Every page with generated parts, and the functions that make the parts.
PAGES: tuple[tuple[Path, tuple[Maker, ...]], ...] = (
    (ROOT / "README.md", (budgets_summary, gpu_summary)),
    (ROOT / "docs/results/demo.md", (demo,)),
    (ROOT / "docs/results/budgets.md", (budgets, efforts)),
    (ROOT / "docs/results/speed.md", (speed, pruning, latency, startup)),
    (ROOT / "docs/results/criteria.md", (quality,)),
    (ROOT / "docs/results/integrated-gradients.md", (worth, integrated_speed, integrated_nodes)),
    (ROOT / "docs/results/recovery.md", (recovery,)),
    (ROOT / "docs/results/healing.md", (healing, healing_probes)),
    (ROOT / "docs/results/task-plans.md", (routing,)),
    (ROOT / "docs/results/multitask.md", (multitask, multitask_speed)),
    (ROOT / "docs/results/corpus.md", (corpus, prompts, runners)),
    (ROOT / "docs/results/engines.md", (engines, shapes)),
    (ROOT / "docs/results/gpu.md", (gpu,)),
    (ROOT / "docs/results/layers.md", (layers, layers_speed)),
    (ROOT / "docs/results/real-models.md", (real_models, real_proofs, real_steps)),
    (ROOT / "docs/results/reproduction.md", (reproduction, reproduction_multitask, reproduction_ldnet)),
    (
        ROOT / "docs/results/compatibility.md",
        (compatibility_versions, compatibility_t5, compatibility_bert, compatibility_llama),
    ),
)
# Each returns PNG files by name, which go to docs/images/.
PLOTS: tuple[Drawer, ...] = (
    budgets_plot,
    gpu_plot,
    integrated_plot,
    reproduction_plots,
    reproduction_multitask_plots,
    reproduction_ldnet_plots,
)
IMAGES = ROOT / "docs/images"


def main() -> None:
    """Write all pages and all figures."""
    for path, makers in PAGES:
        path.write_text(filled(path, *makers), encoding="utf-8")
    for draw in PLOTS:
        for name, content in draw().items():
            (IMAGES / name).write_bytes(content)


def filled(path: Path, *makers: Maker) -> str:
    """Return a page's text with what each maker returns between the marks of the maker's name. Nothing is written.

    Args:
        path: the page. It has a line `<!-- begin:NAME -->` and a line `<!-- end:NAME -->` for each maker.
        makers: functions without arguments that return Markdown.

    Raises:
        ValueError: the page lacks a maker's marks.
    """
    text = path.read_text(encoding="utf-8")
    for make in makers:
        begin, end = f"<!-- begin:{make.__name__} -->", f"<!-- end:{make.__name__} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{path}: expected the marks of {make.__name__} once each")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    main()
