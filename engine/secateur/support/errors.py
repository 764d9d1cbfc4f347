"""The one exception for what a user can put right, and how other exceptions are quoted in it."""

from __future__ import annotations


class InputError(ValueError):
    """An argument or input that cannot be used. The message names it, what was expected and what came.

    The command line prints the message as one line and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
