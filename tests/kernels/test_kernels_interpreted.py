"""The kernels' tests under Triton's interpreter.

They run in a process of their own, because the interpreter must be chosen before Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateur_kernels.backend import INSTALLED, INTERPRETED

TESTS = Path(__file__).parents[1]
NAMES = ["product_sum", "neuron_attribution", "interpolated_norm", "scored_mlp_backward", "kernels_traced", "fused_ffn"]


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this process already runs the interpreter")
def test_under_the_interpreter() -> None:
    files = [str(next(TESTS.rglob(f"test_{name}.py"))) for name in NAMES]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--maxfail=5", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:]
