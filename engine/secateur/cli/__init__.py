"""The command line. A command is a thin layer over the library's functions."""

from __future__ import annotations

import os
import sys
from typing import Any

from secateur.cli.shared.tell import tell

_INTERRUPTED = 130


def main() -> None:
    """Run a command.

    Exit codes: 0 done; 2 unusable arguments or input, reported in one line; 130 interrupted (Ctrl-C); 1 anything else.
    """
    try:
        _run()
    except KeyboardInterrupt:
        _fail("interrupted", _INTERRUPTED)


def _run() -> None:
    """Run the command of the process's arguments, and report its errors."""
    # The advice that other libraries print would hide the one line that reports an error.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import typer

    from secateur.cli.app import app
    from secateur.support.errors import InputError, VerificationError, first_line

    # Some versions of Typer bundle click, others use the installed one. The base of Typer's public class is the right class.
    usage_error: Any = typer.BadParameter.__base__
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except usage_error as error:
        message = error.format_message()
        if not message:  # A command without any arguments has printed its help.
            sys.exit(2)
        _fail(message, 2)
    except typer.Abort:
        _fail("interrupted", _INTERRUPTED)
    except VerificationError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename or 'out'}: {error.strerror or error}", 1)
    except Exception as error:
        from secateur.support.environment import disk_is_full, out_of_memory  # It imports torch, which takes long.

        # The allocator, safetensors, tokenizers and torch.save have no types of their own for a full memory or disk.
        if out_of_memory(error):
            _fail(f"out of memory: {first_line(error)}", 1)
        if not disk_is_full(error):
            raise
        _fail(f"out: cannot be written: {first_line(error)}", 1)
    if code == _INTERRUPTED:  # Typer turns KeyboardInterrupt into this exit code.
        _fail("interrupted", code)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> None:
    """Report an error, and exit."""
    tell(message)
    sys.exit(code)
