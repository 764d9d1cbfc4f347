"""The one exception for what a user can put right."""

from __future__ import annotations


class InputError(ValueError):
    """An argument or input that cannot be used. The message names it, what was expected and what came.

    The command line prints the message as one line and exits with code 2.
    """
