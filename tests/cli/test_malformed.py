"""Malformed inputs from a seeded generator: each ends rightly, or in one line with exit code 1 or 2 and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mutations import damaged_bytes, damaged_json, damaged_tensors

GENERATOR = Path(__file__).parents[1] / "support" / "malformed.py"
FIRST, COUNT = 24_000, 320


@pytest.fixture(scope="module")
def ends() -> dict[int, dict[str, Any]]:
    """How each input ended, by its seed. The inputs run in a fresh process, which forks one process for each input."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(GENERATOR), str(FIRST), str(COUNT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {row["seed"]: row for row in rows}


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_it_ends_rightly_or_in_one_line(seed: int, ends: dict[int, dict[str, Any]]) -> None:
    """`python tests/support/malformed.py SEED 1` repeats one input."""
    end = ends[seed]
    assert end["end"] in ("right", "refused"), f"{end.get('kind')} ({end.get('about')}): {end.get('line')}\n{end['fault']}"


def test_the_inputs_are_malformed(ends: dict[int, dict[str, Any]]) -> None:
    """More than half of the inputs are refused, and every kind of file is among them."""
    counts = Counter(end["end"] for end in ends.values())
    assert counts["refused"] > COUNT / 2
    kinds = {end["kind"].split()[0] for end in ends.values()}
    assert {"config", "weights", "tokenizer", "recipe", "plan", "scores", "yaml-text", "options", "library", "csv"} <= kinds


def test_a_seed_gives_the_same_damage() -> None:
    content = json.dumps({"a": [1, {"b": 2.5}], "c": "text"}).encode()
    for damage in (damaged_json, damaged_bytes):
        assert [damage(Random(seed), content) for seed in range(30)] == [damage(Random(seed), content) for seed in range(30)]
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    tensors = len(header).to_bytes(8, "little") + header + bytes(8)
    assert [damaged_tensors(Random(s), tensors) for s in range(30)] == [damaged_tensors(Random(s), tensors) for s in range(30)]
