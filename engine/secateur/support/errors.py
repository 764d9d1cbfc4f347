"""The two exceptions that the command line reports in one line, and the conversion of other exceptions to InputError."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from secateur.support.urls import redacted

# Exceptions raised while a file is read that is missing, truncated, in another format, or written by another program.
_UNREADABLE: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(zlib.error, SafetensorError, RecursionError, OverflowError),
)


class InputError(ValueError):
    """An argument or input that cannot be used. The message says: `argument: expected ..., got ...`.

    The command line prints the message as one line and exits with code 2. Passwords in URLs are hidden.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


class FieldError(InputError):
    """A field of a file with a wrong value. `reading` adds the file to the message: the message begins with the field."""


class VerificationError(RuntimeError):
    """A pruned model does not equal the masked one. Nothing that a user does should cause it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the exception's type if the message is empty.

    A first line that ends in a colon only announces the second line, so both are returned.

    Args:
        error: The exception.
    """
    lines = [stripped for line in str(error).splitlines() if (stripped := line.strip())] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextmanager
def reading(
    argument: str, path: str | Path, problem: str, *, typed: bool = True, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn exceptions that unreadable files raise into an InputError of one line. An InputError passes through unchanged.

    A `FieldError` becomes an InputError that names the file too.

    Args:
        argument: The argument that the message begins with.
        path: The file or folder that is read inside the context.
        problem: The words after the path, such as "is not a plan file".
        typed: Whether the message quotes the exception with its type, in brackets. Otherwise it quotes only the first line of
            the exception's message, after a colon.
        also: Further types of exceptions to turn.

    Raises:
        InputError: The code inside the context raised one of these exceptions.

    Example:
        >>> with reading("plan", path, "is not a plan file"):
        ...     plan = json.loads(Path(path).read_text())
    """
    kinds: tuple[type[Exception], ...] = (*_UNREADABLE, *also)
    try:
        yield
    except FieldError as error:
        raise InputError(f"{argument}: {str(path)!r} {problem} ({error})") from error
    except InputError:
        raise
    except kinds as error:
        line = first_line(error)
        detail = f" ({type(error).__name__}: {line})" if typed else f": {line}"
        raise InputError(f"{argument}: {str(path)!r} {problem}{detail}") from error
