"""Results of the commands: tables or one JSON document on stdout."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from rich.console import Console
from rich.table import Table

from secateur.attribution.scores import Scores
from secateur.cli.shared.options import Overwrite, Resume
from secateur.cli.shared.tell import say as say
from secateur.flow.sweep import Point
from secateur.measuring.benchmark import COLUMNS, Report
from secateur.measuring.compare import Comparison
from secateur.model.sites import Site
from secateur.planning.plan import Plan
from secateur.reproduction.shared.claim import Claim
from secateur.support.files import claimed
from secateur.support.ledger import require_not_begun
from secateur.support.urls import redacted

P = ParamSpec("P")


def claims_out(kind: str = "folder") -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Return a decorator for commands that write a new output: the command has its --out for itself while it runs.

    The command gets the option --overwrite. Its parameter `out` may be None, for a command that then writes nothing. A dry run
    (`dry`) writes nothing either.

    Args:
        kind: The kind of output, "folder" or "file", as in `claimed`.
    """

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        @wraps(command)
        def guarded(*arguments: P.args, **options: P.kwargs) -> None:
            out, overwrite = options.get("out"), bool(options.pop("overwrite", False))
            writes = out is not None and not options.get("dry")
            with claimed(str(out), kind, overwrite=overwrite, inputs=inputs_among(options)) if writes else nullcontext():
                command(*arguments, **options)

        return _with_flag(guarded, "overwrite", Overwrite)

    return decorate


def resumes(command: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command with a run folder: it continues a begun folder only with the option --resume, which it gets."""

    @wraps(command)
    def guarded(*arguments: P.args, **options: P.kwargs) -> None:
        # Under torchrun the first process may begin the folder before another process looks at it.
        if not options.pop("resume", False) and os.environ.get("RANK", "0") == "0":
            require_not_begun(Path(str(options["out"])))
        command(*arguments, **options)

    return _with_flag(guarded, "resume", Resume)


def _with_flag(command: Callable[P, None], name: str, annotation: Any) -> Callable[P, None]:
    """Return a command whose signature has a further option, which is off by default."""
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), option]
    )
    return command


def inputs_among(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the options of a command that may name files it reads, with their values, as `claimed` takes them."""
    return [(name, str(value)) for name, value in options.items() if name != "out" and isinstance(value, (str, Path))]


def emit(document: dict[str, Any], as_json: bool, *tables: Table | str) -> None:
    """Print a command's result: the document with --json, else the tables and lines."""
    if as_json:
        print(redacted(json.dumps(document, indent=1)))
        return
    # Piped output is wide enough that no column is cut.
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        shown = redacted(table) if isinstance(table, str) else table
        console.print(shown, highlight=False, markup=False, soft_wrap=isinstance(table, str))


def side_by_side(rows: Sequence[tuple[str, str, str]]) -> Table:
    """Return a table of dense against pruned."""
    return table(("", "dense", "pruned"), rows)


def points_table(points: Sequence[Point]) -> Table:
    """Return a table of a sweep's points."""
    columns = (
        points[0].budget,
        points[0].metric,
        "95% interval",
        "parameters",
        "MFLOPs",
        "latency ms",
        "speed-up",
        "examples/s",
    )
    rows = (
        (
            f"{p.amount:g}", f"{p.value:.3f}", f"{p.low:.3f} to {p.high:.3f}", f"{p.parameters:,}", f"{p.flops / 1e6:,.0f}",
            f"{p.latency_ms:.1f}", f"{p.speedup:.2f}x", f"{p.examples_per_second:,.0f}",
        )
        for p in points
    )  # fmt: skip
    return table(columns, rows)


def timings_table(report: Report) -> Table:
    """Return a table of a benchmark's batch shapes."""
    return table(COLUMNS, report.cells())


def plan_table(plan: Plan) -> Table:
    """Return a table of the units that each site keeps."""
    rows = (
        (site.name, site.unit, str(site.units), str(len(plan[site.name])), f"{len(plan[site.name]) / site.units:.2f}")
        for site in plan.sites
    )
    return table(("site", "unit", "units", "kept", "share"), rows)


def sites_table(sites: Sequence[Site]) -> Table:
    """Return a table of sites, with the cost of a unit."""
    rows = (
        (site.name, site.unit, str(site.units), f"{site.parameters:,.0f}", f"{site.flops + site.source_flops:,.0f}")
        for site in sites
    )
    return table(("site", "unit", "units", "parameters a unit", "FLOPs a token a unit"), rows)


def scores_table(scores: Scores) -> Table:
    """Return a table of the range of each site's scores."""
    rows = (
        (site.name, site.unit, str(site.units), *(f"{float(v):.4g}" for v in (values.min(), values.median(), values.max())))
        for site, values in ((site, scores[site.name]) for site in scores.sites)
    )
    return table(("site", "unit", "units", "lowest", "median", "highest"), rows)


def criteria_table(criteria: Sequence[dict[str, Any]]) -> Table:
    """Return a table of criteria and their settings."""
    rows = (
        (criterion["name"], criterion["summary"], ", ".join(f"{name}={value}" for name, value in criterion["settings"].items()))
        for criterion in criteria
    )
    return table(("name", "scores", "settings"), rows, left=3)


def convergence(scores: Scores) -> list[Table | str]:
    """Return a table of how exact integrated gradients are, by path, and a line about examples that missed the tolerance.

    Scores of other criteria have neither.
    """
    measured = scores.convergence
    if measured is None:
        return []
    rows = (
        (path, f"{s['nodes']:.1f}", f"{s['residual']:.2%}", f"{s['error']:.2%}", f"{s['doubled']:.2%}", f"{s['missed']:.0f}")
        for path, s in measured.summary().items()
    )
    shown: list[Table | str] = [table(("path", "nodes", "residual", "estimated error", "twice the nodes", "missed"), rows)]
    missed_rows = {row for of_path in measured.missed().values() for row in of_path}
    if missed_rows:
        shown.append(
            f"{len(missed_rows)} examples missed the tolerance of {measured.tolerance:.2g} at some site: "
            "max_nodes allows no more nodes"
        )
    return shown


def claims_table(claims: Sequence[Claim]) -> Table:
    """Return a table of a paper's claims beside the results of a run."""
    rows = ((claim.claim, claim.paper, claim.ours, claim.verdict) for claim in claims)
    return table(("claim", "the paper", "this run", "held"), rows)


def compared(comparison: Comparison) -> list[Table | str]:
    """Return a table of dense against pruned, a table of their timings, and the benchmark's notes."""
    return [side_by_side(comparison.rows()), timings_table(comparison.benchmark), *comparison.benchmark.notes]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """Return a plain table. Its first `left` columns are left-aligned."""
    plain = Table(box=None, pad_edge=False, header_style="bold")
    for k, column in enumerate(columns):
        plain.add_column(column, justify="left" if k < left else "right")
    for row in rows:
        plain.add_row(*row)
    return plain


def evaluations_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of each task's metric and its interval."""
    table = Table("task", "metric", "value", "95% interval", "examples")
    for name, evaluation in ((name, one) for name, both in tasks.items() for one in (both, both.get("also")) if one):
        interval = f"{evaluation['low']:.3f} to {evaluation['high']:.3f}"
        table.add_row(name, evaluation["metric"], f"{evaluation['value']:.3f}", interval, str(evaluation["examples"]))
    return table
