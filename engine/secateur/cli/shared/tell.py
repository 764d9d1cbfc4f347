"""Lines on stderr and in the file of --log, as --quiet and --verbose want them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from secateur.support.errors import InputError
from secateur.support.urls import redacted


@dataclass
class _Wanted:
    """What the running command says, and where.

    Attributes:
        quiet: Whether stderr gets errors alone. The file gets all lines.
        log: The file.
    """

    quiet: bool = False
    log: Path | None = None


wanted = _Wanted()


def tell(message: str) -> None:
    """Print an error message as one line on stderr. Passwords in URLs are hidden."""
    line = "secateur: " + redacted(" ".join(message.split()))
    note(line)
    print(line, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a line on stderr, unless --quiet is given. Passwords in URLs are hidden."""
    note(text)
    if not wanted.quiet:
        from secateur.cli.shared.bars import stderr

        stderr.print(redacted(text), highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Append a line with the time to the file of --log, if there is one. Passwords in URLs are hidden."""
    if wanted.log is not None:
        with wanted.log.open("a") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {redacted(text)}\n")


@contextmanager
def speaking(quiet: bool, verbose: bool, log: Path | None) -> Iterator[None]:
    """Say while a command runs what --quiet, --verbose and --log want. `quiet` and `log` hold on for the error at its end.

    Args:
        quiet: Whether stderr gets errors alone.
        verbose: Whether the library's lines at the level INFO and the warnings of transformers are said too.
        log: The file that all lines are appended to.

    Raises:
        InputError: Both `quiet` and `verbose` are set, or the file cannot be written to.
    """
    wanted.quiet, wanted.log = quiet, None
    if quiet and verbose:
        raise InputError("quiet, verbose: expected one of them, got both")
    if log is not None:
        try:
            log.open("a").close()
        except OSError as error:
            raise InputError(f"log: expected a file that can be written to, got {str(log)!r} ({error.strerror})") from error
        wanted.log = log.absolute()
    levels = {"secateur": logging.INFO if verbose else logging.WARNING}
    if verbose:
        from transformers.utils.logging import disable_default_handler

        disable_default_handler()  # It would print the lines a second time.
        levels["transformers"] = logging.WARNING
    handler = _Says()
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        for name, level in levels.items():
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).setLevel(level)


class _Says(logging.Handler):
    """Says a logger's lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say a line."""
        say(self.format(record))
