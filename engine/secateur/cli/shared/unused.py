"""Refuse options that another option leaves without effect."""

from __future__ import annotations

from typing import Any

from secateur.support.errors import InputError
from secateur.support.fields import shown


def require_unused(cause: str, **options: tuple[Any, Any]) -> None:
    """Refuse options that have other values than their defaults.

    Args:
        cause: What leaves them without effect, as in "with --plan".
        options: The value and the default of each, by name.

    Raises:
        InputError: One of them has another value.
    """
    for name, (value, default) in options.items():
        if value != default:
            raise InputError(f"{name.replace('_', '-')}: expected none {cause}, where it has no effect, got {shown(value)}")
