"""A new Python process that loads model folders: offline, with an empty cache of remote code, with or without secateur."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# The beginning of a script: from here on, secateur cannot be imported.
BLOCK_SECATEUR = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("secateur", "secateur_kernels"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
try:
    import secateur
except ImportError:
    pass
else:
    raise SystemExit("secateur can be imported")
"""


def run_script(script: str, folder: Path, *arguments: str) -> str:
    """Run a script in a new process, with the folder as its working directory, and return its standard output.

    AssertionError: the script fails.
    """
    # transformers caches remote code under HF_HOME. An empty HF_HOME rules out the code of an earlier run.
    variables = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
