"""Run the command line in a test: in this process, or in a process that the test kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.cli import main
from secateur.data import builtin

Run = Callable[..., "Result"]


@dataclass(frozen=True)
class Result:
    """The result of a command: its exit code, its stdout, and the lines of its stderr."""

    code: int
    out: str
    errors: list[str]

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on stdout."""
        document: dict[str, Any] = json.loads(self.out)
        return document


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs a command line in a new folder with train.jsonl and test.jsonl of a built-in task.

    The command line is split at spaces. Further arguments are words that may have spaces.
    """
    monkeypatch.chdir(tmp_path)
    for name, file in (("movie", "train.jsonl"), ("movie.test", "test.jsonl")):
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in builtin.examples(name)[:48]))

    def command(line: str, *words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["secateur", *line.split(), *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        code = stop.value.code
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err.strip().splitlines())

    return command


def assert_refused(result: Result, message: str, folder: Path | str) -> None:
    """Check for exit code 2, the message as the last line of stderr, an empty stdout, and no output folder."""
    assert result.code == 2
    assert result.errors[-1].startswith(f"secateur: {message}"), result.errors
    assert result.out == ""
    assert not Path(folder).exists()


COMMAND = [sys.executable, "-c", "from secateur.cli import main; main()"]


def killed_in(folder: Path, line: str, checkpoint: str) -> None:
    """Run a command and kill it shortly after it has written its first checkpoint."""
    process = subprocess.Popen([*COMMAND, *line.split()], cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob(f"{checkpoint}/checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def same_weights(one: Path, other: Path) -> bool:
    """Tell whether two model folders hold bit-identical weights."""
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
