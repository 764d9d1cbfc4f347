"""Helpers of the shortcuts: whether a module is unchanged, and a context that changes a module's class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.support.compat import has_hooks


def untouched(module: nn.Module) -> bool:
    """Return whether a module has no hooks and its own forward.

    Accelerate, for example, hooks modules and replaces their forward. Then other code may run in place of the module.
    """
    return not has_hooks(module) and "forward" not in vars(module)


@contextmanager
def of_class(module: nn.Module, kind: type[Any]) -> Iterator[None]:
    """A context in which the module has that class."""
    usual: Any = type(module)
    module.__class__ = kind
    try:
        yield
    finally:
        module.__class__ = usual
