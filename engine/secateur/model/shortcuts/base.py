"""What shortcuts share: whether a module is as its author made it, and a module that changes its class for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def untouched(module: nn.Module) -> bool:
    """Whether nobody hooked a module or replaced its forward, as Accelerate does: something else may stand in for it."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(module, name) for name in hooks) and "forward" not in vars(module)


@contextmanager
def of_class(module: nn.Module, kind: type[Any]) -> Iterator[None]:
    """Within it the module is of that class."""
    usual: Any = type(module)
    module.__class__ = kind
    try:
        yield
    finally:
        module.__class__ = usual
