"""`secateur prune --dry-run`: compute the sizes of the pruned model from the config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from secateur.attribution.scores import Scores
from secateur.cli.shared import output
from secateur.measuring.dry_run import DryRun, dry_run
from secateur.model.sites import counted
from secateur.planning.budget import Budget
from secateur.planning.plan import Plan
from secateur.pruning.describe import stock_class
from secateur.support.errors import InputError

_SHOWN = 6


def run(
    name: str,
    model: nn.Module,
    given: Plan | None,
    scores: Path | None,
    budget: Budget | None,
    shapes: tuple[Sequence[int], Sequence[int]],
    *,
    select: str | None,
    **options: Any,
) -> tuple[dict[str, Any], list[Table | str]]:
    """Carry out a dry run.

    Args:
        name: The folder or Hub name of the model.
        model: The model on the meta device.
        given: The plan of --plan, if it is given.
        scores: The file of --scores, if it is given.
        budget: The budget; None with a plan.
        shapes: Batch sizes and lengths. The forward pass whose FLOPs are counted has the largest of each.
        select: The sites to prune.
        options: Further arguments of `secateur.dry_run`.

    Returns:
        The JSON document, and the tables and lines to print.

    Raises:
        InputError: As in `secateur.dry_run`.
    """
    if budget is not None:
        options[budget.kind] = budget.amount
    loaded = None if scores is None else Scores.load(scores)
    if loaded is not None and select is not None:
        loaded = loaded.of(select)
    result = dry_run(
        model, given=given, scores=loaded, select=select, batch_size=max(shapes[0]), length=max(shapes[1]), **options
    )
    return {"model": name, **result.to_json()}, [
        _sizes(result),
        _first_sites(result.plan),
        *_lines(result, model, searched=given is None),
    ]


def require_real(data: str | None, out: Path | None, scores: Path | None) -> tuple[str, Path]:
    """Return the data and the output folder, which only a dry run can do without.

    Raises:
        InputError: One is missing, or --scores is given, which only a dry run takes.
    """
    if data is None:
        raise InputError("data: expected --data with examples, which only --dry-run goes without, got none")
    if out is None:
        raise InputError("out: expected --out with a folder, which only --dry-run goes without, got none")
    if scores is not None:
        raise InputError(f"scores: expected --dry-run with it (else: plan, and prune with --plan), got {str(scores)!r}")
    return data, out


def _sizes(result: DryRun) -> Table:
    """A table of sizes and FLOPs, dense and pruned."""
    dense, pruned = result.dense, result.pruned
    rows = [
        ("parameters", f"{dense.parameters:,}", f"{pruned.parameters:,} ({pruned.parameters / dense.parameters:.0%})"),
        _row("of the prunable layers", dense.layer_parameters, pruned.layer_parameters, _count),
    ]
    rows += [
        _row(f"weights in {dtype}", size, pruned.weight_bytes[dtype], amount) for dtype, size in dense.weight_bytes.items()
    ]
    for stack, size in dense.cache_bytes.items():
        rows.append(_row(f"keys and values, a token of the {stack}", size, pruned.cache_bytes.get(stack, 0), amount))
    shape = " x ".join(map(str, result.shape))
    return output.side_by_side([*rows, _row(f"FLOPs of a pass, {shape} tokens", dense.flops, pruned.flops, _count)])


def _row(what: str, dense: int, pruned: int, written: Any) -> tuple[str, str, str]:
    """A row of the comparison. `written` turns a number into text."""
    return what, written(dense), f"{written(pruned)} ({pruned / dense:.0%})"


def _first_sites(plan: Plan) -> Table:
    """A table of the kinds of sites with their numbers, then of the first few sites by name."""
    kinds: Counter[tuple[str, str, int, int]] = Counter()
    for site in plan.sites:
        kinds[f"{site.stack} {site.kind}", site.unit, site.units, len(plan[site.name])] += 1
    rows = [(f"{number} x {kind}", unit, f"{units:,}", f"{kept:,}") for (kind, unit, units, kept), number in kinds.items()]
    rows = rows[:_SHOWN] + [("...", "", "", "")] * (len(rows) > _SHOWN)
    rows += [(site.name, site.unit, f"{site.units:,}", f"{len(plan[site.name]):,}") for site in plan.sites[:_SHOWN]]
    return output.table(("sites", "unit", "units", "kept"), rows)


def _lines(result: DryRun, model: Any, *, searched: bool) -> list[str]:
    """Lines about the shares that remain, the memory that scoring takes, and whether the pruned model is a stock one."""
    memory, name = result.attribution, stock_class(model).__name__
    left = result.plan.budget_json().get("remaining")
    lines = [
        f"to score it, {memory.batch_size} examples of {memory.length} tokens a batch: about {amount(memory.total)}: weights "
        f"{amount(memory.weights)}, activations and their gradients {amount(memory.activations)}, sums {amount(memory.sums)}",
        f"the pruned model is a stock {name}"
        if result.stock
        else f"the pruned model is no stock {name}: its folder carries a modelling file",
    ]
    if result.plan.spread is not None and result.plan.spread.shape == "stock":
        removed, of_model = len(result.plan.removed_blocks), len({site.block for site in result.plan.sites})
        how = ", the fewest within the budget; a real run tries several, in the order of what they change" if searched else ""
        lines.insert(0, f"{removed} of {counted(of_model, 'block')} removed{how}")
    if left is not None:
        lines.insert(0, f"of the layers remain {left['params']:.1%} of the parameters, {left['flops']:.1%} of the FLOPs")
    return [*lines, "dry run: nothing was scored, measured or written"]


def amount(size: float) -> str:
    """Return a number of bytes as text, in a unit that suits its size."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _count(number: float) -> str:
    """A count as text, in thousands (K), millions (M), ..."""
    return _scaled(number, 1000, ("", "K", "M", "G", "T", "P"))


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    """A value as text, in the largest unit in which it is at least 1. Every unit is `step` times the unit before it."""
    power = 0
    while value >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    return f"{value:,.2f} {units[power]}".rstrip()
