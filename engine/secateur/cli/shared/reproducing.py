"""The common part of the `secateur reproduce` commands: run the remaining cells, write the report, show the claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from secateur.cli.shared import output
from secateur.cli.shared.bars import bars
from secateur.reproduction.shared.claim import Claim, verdicts
from secateur.support.ledger import Ledger
from secateur.support.progress import counted


class Recorded(Protocol):
    """A cell, as the ledger records it."""

    def to_json(self) -> dict[str, Any]: ...


C = TypeVar("C", bound=Recorded)
Write = Callable[[Sequence[Mapping[str, Any]]], list[Claim]]


def run_cells(
    out: Path,
    settings: Mapping[str, Any],
    cells: Sequence[C],
    run: Callable[[C], Mapping[str, Any]],
    write: Write,
    as_json: bool,
    results: Mapping[str, Any],
) -> None:
    """Run the cells that the folder does not have yet, write the run's files, and print the claims.

    Args:
        out: The folder of the run.
        settings: The run's settings, which a resumed run must share.
        cells: All cells.
        run: Runs a cell and returns its results.
        write: Writes the run's files from the finished cells, and returns the claims.
        as_json: Print a JSON document instead of a table.
        results: The type of each result of a cell, as in `Ledger`.

    Raises:
        InputError: As in `Ledger`, `run` and `write`.
    """
    with Ledger(out, settings, results) as ledger:
        left = [cell for cell in cells if cell.to_json() not in ledger]
        output.say(f"{len(cells)} cells, {len(cells) - len(left)} of them finished before")
        for cell in counted(bars(), "cells", left, len(left)):
            ledger.add(cell.to_json(), run(cell))
        claims = write(ledger.rows())
    document = {"out": str(out), "cells": len(cells), "claims": [claim.to_json() for claim in claims]}
    line = f"{verdicts(claims)}; report, figures and cells in {out}"
    output.emit(document, as_json, output.claims_table(claims), line)
