"""What every verb of `secateur reproduce` does with its cells: runs those that are left, reports, shows the claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from secateur.cli.shared import output
from secateur.reproduction.shared.claim import Claim
from secateur.support.ledger import Ledger


class Recorded(Protocol):
    """A cell, as the ledger knows it."""

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
) -> None:
    """Runs the cells that the folder has not, and writes the run's files by `write`, which gets the finished cells and returns
    the claims; these are what is shown. Raises InputError as `Ledger` and the functions given."""
    with Ledger(out, settings) as ledger:
        left = [cell for cell in cells if cell.to_json() not in ledger]
        output.say(f"{len(cells)} cells, {len(cells) - len(left)} of them finished before")
        for cell in output.step_progress(left, len(left), "cells"):
            ledger.add(cell.to_json(), run(cell))
        claims = write(ledger.rows())
    document = {"out": str(out), "cells": len(cells), "claims": [claim.to_json() for claim in claims]}
    line = f"{sum(claim.held for claim in claims)} of {len(claims)} claims held; report, figures and cells in {out}"
    output.emit(document, as_json, output.claims_table(claims), line)
