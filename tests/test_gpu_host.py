"""The tests of a GPU host need little: torch, Triton, transformers, pytest and what these bring."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# Packages that secateur or its other tests use, and that a GPU host need not have.
MISSING = (
    *("accelerate", "ctranslate2", "datasets", "gguf", "hypothesis", "ipykernel", "matplotlib", "nbclient", "onnx"),
    *("onnxruntime", "onnxscript", "openvino", "pandas", "PIL", "polars", "pyarrow", "scipy", "sentencepiece", "seqeval"),
    *("sklearn", "torchvision", "xdist"),
)


def run_without(packages: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process in which packages cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # Plugins are packages too.
    command = [sys.executable, "-c", hide + code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_the_gpu_tests_are_collected_without_other_packages() -> None:
    (command,) = re.findall(r"-m pytest (-m gpu.*)", (ROOT / "Makefile").read_text())
    code = f"import pytest; sys.exit(pytest.main({[*command.split(), '--collect-only']!r}))"
    done = run_without(MISSING, code)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_kernels_gpu.py" in done.stdout
    assert "test_gpu.py" in done.stdout


def test_all_tests_with_the_mark_are_in_the_folder_that_is_collected() -> None:
    (folder,) = re.findall(r"-m pytest -m gpu (\S+)", (ROOT / "Makefile").read_text())
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu\b", path.read_text())}
    assert marked
    assert all(path.is_relative_to(ROOT / folder) for path in marked)


def test_the_deprecation_of_script_method_alone_is_no_error() -> None:
    warnings.warn(
        "`torch.jit.script_method` is deprecated. Please switch to `torch.compile`.", DeprecationWarning, stacklevel=1
    )
    with pytest.raises(DeprecationWarning):
        warnings.warn("`torch.jit.script` is deprecated.", DeprecationWarning, stacklevel=1)
    assert "`torch.jit.script_method` is" in Path(torch.jit._script.__file__).read_text()
