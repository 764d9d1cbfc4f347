"""Runs the timings (pytest-benchmark) and the comparison of criteria, and writes bench/results/*.json.

python bench/run.py [speed] [quality]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def commit() -> str:
    """The commit that was measured, with a plus sign where the tree differs from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=HERE, capture_output=True, text=True, check=True)
    return found.stdout.strip()


def speed() -> dict[str, Any]:
    """The ratios of bench_*.py."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE), str(HERE)]
        subprocess.run([*command, f"--benchmark-json={raw}"], check=True)
        measured = json.loads(raw.read_text())
    machine = {key: measured["machine_info"]["cpu"].get(key) for key in ("brand_raw", "count")}
    rows = [{"group": b["group"], "seconds": b["stats"]["median"], **b["extra_info"]} for b in measured["benchmarks"]]
    return {"machine": machine, "rows": rows}


def main() -> None:
    wanted = sys.argv[1:] or ["speed", "quality"]
    RESULTS.mkdir(exist_ok=True)
    for name in wanted:
        if name == "speed":
            result = speed()
        else:
            from quality import compare_criteria

            result = compare_criteria()
        text = json.dumps({"commit": commit(), **result}, indent=1) + "\n"
        (RESULTS / f"{name}.json").write_text(text)
        print(f"written: {RESULTS / f'{name}.json'}")


if __name__ == "__main__":
    main()
