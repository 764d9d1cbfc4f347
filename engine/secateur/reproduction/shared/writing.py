"""The files of a finished run: its cells as CSV and JSON, its figures and its report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.reproduction.shared.claim import Claim
from secateur.support.files import write_atomically


def write_run(
    folder: Path,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    claims: Sequence[Claim],
    figures: Mapping[str, bytes],
    lines: Iterable[str],
) -> None:
    """Write cells.csv, cells.json, the figures and report.md.

    Args:
        folder: The folder to write to.
        title: The report's title.
        rows: The finished cells; all have the same fields.
        settings: The run's settings as JSON values.
        environment: The environment of the run.
        claims: The claims.
        figures: PNG data by file name.
        lines: The lines of the report in Markdown, without its title.
    """
    document = {
        "settings": settings, "environment": environment, "claims": [claim.to_json() for claim in claims], "cells": rows,
    }  # fmt: skip
    write_atomically(folder / "cells.json", json.dumps(document, indent=1) + "\n")
    write_atomically(folder / "cells.csv", _csv(rows))
    for name, png in figures.items():
        write_atomically(folder / name, png)
    write_atomically(folder / "report.md", f"# {title}\n\n" + "\n".join(lines) + "\n")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as CSV, with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
