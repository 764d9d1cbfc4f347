"""What a run leaves behind: its cells as CSV and JSON, the figures, and a report."""

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
    about: Mapping[str, Any],
    claims: Sequence[Claim],
    figures: Mapping[str, bytes],
    lines: Iterable[str],
) -> None:
    """Writes cells.csv, cells.json, the figures by file name, and report.md. rows: the cells. about: the environment. lines: of
    the report, in Markdown."""
    document = {
        "settings": settings, "environment": about, "claims": [claim.to_json() for claim in claims], "cells": rows,
    }  # fmt: skip
    write_atomically(folder / "cells.json", json.dumps(document, indent=1) + "\n")
    write_atomically(folder / "cells.csv", _csv(rows))
    for name, png in figures.items():
        write_atomically(folder / name, png)
    write_atomically(folder / "report.md", f"# {title}\n\n" + "\n".join(lines) + "\n")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
