"""The tests of the kernels under Triton's interpreter, in a process of its own: it must be asked for before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateur_kernels.backend import FOUND

HERE = Path(__file__).parent
OPERATIONS = ["product_sum"]


@pytest.mark.skipif(not FOUND, reason="triton is not installed")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_under_the_interpreter(operation: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / f"test_{operation}.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:]
