"""Start-up: the time of new processes that import secateur or print help, compared with `python -c "import torch"`.

The time is the processor's (user and system) in the child process. It is what a calm machine's clock shows when all files are
cached, and other processes of a busy machine hardly change it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bench.support.interleaved import compare
from secateur.support.environment import environment

SECATEUR = str(Path(sysconfig.get_path("scripts")) / "secateur")
# The first one is the reference of the ratios.
COMMANDS: dict[str, list[str]] = {
    "torch": [sys.executable, "-c", "import torch"],
    "transformers": [sys.executable, "-c", "import transformers"],
    "secateur": [sys.executable, "-c", "import secateur"],
    "compress": [sys.executable, "-c", "from secateur import compress"],
    "help": [SECATEUR, "--help"],
    "prune_help": [SECATEUR, "prune", "--help"],
    "score_help": [SECATEUR, "score", "--help"],
}


def startup(rounds: int = 11, names: Sequence[str] = tuple(COMMANDS)) -> dict[str, Any]:
    """Time new processes in turn, after one run of each, which leaves files and bytecode in caches."""
    functions = {name: partial(_run, COMMANDS[name]) for name in names}
    about, load = environment(nn.Linear(1, 1)), os.getloadavg()
    times = compare(functions, rounds=rounds, warmup=1, clock=_children_seconds)
    return {"environment": about, "load": load, "rounds": rounds, "times": times}


def _children_seconds() -> float:
    """Return the processor's seconds in all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _run(command: Sequence[str]) -> None:
    """Run a command to its end. Its output is not shown."""
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
