"""The command that runs now, for files that say how they were made."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Running:
    """A command.

    Attributes:
        line: The command line as it can be typed again, without passwords.
        held_out: Its held-out examples as they were named, "" for none.
    """

    line: str
    held_out: str


# None where no command runs: the library was called.
RUNNING: ContextVar[Running | None] = ContextVar("RUNNING", default=None)
