"""The report on LD-Net: claims, tables, figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.reproduction.ldnet.claims import claims
from secateur.reproduction.ldnet.figures import draw
from secateur.reproduction.ldnet.grid import LAYER_DROPOUT, NO_LM, Cell, Settings, pruned_cells
from secateur.reproduction.ldnet.results import Results
from secateur.reproduction.shared.claim import Claim, claims_table
from secateur.reproduction.shared.writing import write_run


def write(folder: Path, rows: Sequence[Mapping[str, Any]], settings: Settings, environment: Mapping[str, Any]) -> list[Claim]:
    """Write cells.csv, cells.json, the figures and report.md.

    Args:
        folder: The folder to write to.
        rows: The finished cells.
        settings: The run's settings.
        environment: The environment of the run.

    Returns:
        The claims, with the paper's and the run's figures.
    """
    results = Results(rows, settings)
    checked = claims(results)
    title = "LD-Net (arXiv 1804.07827), reproduced"
    figures = draw(results, environment)
    write_run(folder, title, rows, settings.to_json(), environment, checked, figures, lines(results, checked))
    return checked


def lines(results: Results, checked: Sequence[Claim], images: str = "") -> Iterator[str]:
    """Write the report in Markdown, without its title.

    Args:
        results: The finished cells.
        checked: The claims.
        images: A prefix of the figures' file names.

    Yields:
        The lines.
    """
    settings = results.settings
    examples = "all" if settings.examples is None else f"{settings.examples:,}"
    yield (
        f"Language models of {settings.layers} layers of {settings.width} in each direction, {settings.steps:,} steps of "
        f"{settings.lm_batch_size} sentences; taggers on {examples} sentences, {settings.epochs:g} epochs whole and "
        f"{settings.prune_epochs:g} with the penalty (lambda0 {settings.lambda0:g}, gates' learning rate "
        f"{settings.gate_learning_rate:g}); claims are checked on --{'test' if results.split == 'test' else 'eval'}; seed "
        f"{settings.seed}."
    )
    yield ""
    yield from claims_table(checked)
    yield ""
    yield from _language_models(results)
    for task in settings.columns:
        yield ""
        yield from _taggers(results, task)
    for name in ("gates", "layers"):
        yield ""
        yield f"![{name}]({images}{name}.png)"


def _language_models(results: Results) -> Iterator[str]:
    """Write the table of the language models' perplexities."""
    yield "| language models | perplexity forward | backward |"
    yield "|---|--:|--:|"
    for lm in LAYER_DROPOUT:
        row = results.row(Cell(lm))
        yield f"| {lm} | {row['perplexity_forward']:.1f} | {row['perplexity_backward']:.1f} |"


def _taggers(results: Results, task: str) -> Iterator[str]:
    """Write the table of a task's taggers."""
    tests = ["test"] if results.split == "test" else []
    yield f"Taggers for {task}, F1 with its 95% interval:"
    yield ""
    columns = ["language models", "layers wanted", "left", "eval", *tests, "MFLOPs a word", "words/s", "speed-up"]
    yield f"| {' | '.join(columns)} |"
    yield "|---|" + "--:|" * (len(columns) - 1)
    cells = [Cell(NO_LM, task)]
    for lm in LAYER_DROPOUT:
        cells += [Cell(lm, task), *(cell for cell in pruned_cells(results.settings, task) if cell.lm == lm)]
    for cell in cells:
        row = results.row(cell)
        values = [f"{100 * row[s]:.2f} [{100 * row[f'{s}_low']:.2f}, {100 * row[f'{s}_high']:.2f}]" for s in ("dev", *tests)]
        speed = ("", "") if row["speedup"] is None else (f"{row['words_per_second']:,.0f}", f"{row['speedup']:.2f}x")
        wanted = "whole" if cell.wanted is None else f"{cell.wanted}"
        shown = (cell.lm, wanted, f"{row['layers']:.0f}", *values, f"{row['flops'] / 1e6:.2f}", *speed)
        yield f"| {' | '.join(shown)} |"
