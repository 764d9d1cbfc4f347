"""The command that runs now, for files that say how they were made."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

RUN_FILE = "run.yaml"


@dataclass(frozen=True)
class Running:
    """A command.

    Attributes:
        line: The command line as it can be typed again, without passwords.
        held_out: Its held-out examples as they were named, "" for none.
        out: Its output, "" for none.
        run_file: The text of the `RUN_FILE` that repeats it, for its output folder.
    """

    line: str
    held_out: str
    out: str
    run_file: str

    def makes(self, path: Path) -> bool:
        """Tell whether a path is the command's output."""
        return bool(self.out) and Path(self.out).absolute() == path.absolute()


# None where no command runs: the library was called.
RUNNING: ContextVar[Running | None] = ContextVar("RUNNING", default=None)
