"""Pages of the documentation as tests read them: their code blocks, and a process that runs one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def code_blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Return the language and the text of a page's fenced code blocks in the given languages, in order."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in blocks if language in languages]


def run_block(language: str, text: str, folder: Path, **environment: str) -> str:
    """Run a python or sh block in a process of its own, in the folder, and return its standard output.

    `secateur` in a sh block is this Python's secateur. AssertionError: the block fails.
    """
    if language == "sh":
        text = f'set -eu\nsecateur() {{ "{sys.executable}" -m secateur "$@"; }}\n{text}'
    command = [sys.executable, "-c", text] if language == "python" else ["sh", "-c", text]
    paths = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
    variables = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",  # Tests run side by side, one on each core.
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / ".modules"),
        **environment,
    }
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"{text}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout
