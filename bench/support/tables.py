"""The committed results, and tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bench.support.provenance import RESULTS


def result(name: str) -> dict[str, Any]:
    """Return the committed result file with this name."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
