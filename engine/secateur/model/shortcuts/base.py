"""What shortcuts share: whether a module is as its author made it, and a module that changes its class for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.support.compat import has_hooks


def untouched(module: nn.Module) -> bool:
    """Tell whether nobody hooked the module or replaced its forward, as Accelerate does.

    Where somebody did, something else may stand in for the module.
    """
    return not has_hooks(module) and "forward" not in vars(module)


@contextmanager
def of_class(module: nn.Module, kind: type[Any]) -> Iterator[None]:
    """Within it the module is of that class."""
    usual: Any = type(module)
    module.__class__ = kind
    try:
        yield
    finally:
        module.__class__ = usual
