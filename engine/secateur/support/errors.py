"""The one exception for what a user can put right, and how other exceptions become one."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What a file that is missing, cut off, of another format or of another program's making raises while it is read.
_UNREADABLE: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(zlib.error, SafetensorError),
)


class InputError(ValueError):
    """An argument or input that cannot be used. The message names it, what was expected and what came.

    The command line prints the message as one line and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def reading(
    argument: str, path: str | Path, problem: str, *, typed: bool = True, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn what goes wrong while a file or folder is read into one InputError line. An InputError passes through.

    Args:
        argument: The argument that the message begins with.
        path: The file or folder.
        problem: The words after the path, such as "is not a plan file".
        typed: Whether the message quotes the exception with its type, in brackets, or its first line alone, after a colon.
        also: Further exceptions to turn.

    Raises:
        InputError: The code inside raised an exception of a kind that unreadable files raise.

    Example:
        >>> with reading("plan", path, "is not a plan file"):
        ...     plan = json.loads(Path(path).read_text())
    """
    kinds: tuple[type[Exception], ...] = (*_UNREADABLE, *also)
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        line = first_line(error)
        detail = f" ({type(error).__name__}: {line})" if typed else f": {line}"
        raise InputError(f"{argument}: {str(path)!r} {problem}{detail}") from error
