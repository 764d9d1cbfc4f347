"""Where results lie, and the commit that was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def commit() -> str:
    """The commit that was measured, with a plus sign where the tree differs from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.strip()
