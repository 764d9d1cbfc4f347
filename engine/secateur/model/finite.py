"""Find where NaN or inf begins in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def first_not_finite(model: nn.Module, layers: Mapping[str, str], run: Callable[[], Any]) -> str | None:
    """Return the name of the first layer whose input is not finite, by one more forward pass.

    Args:
        model: The model.
        layers: The path of each layer by name.
        run: A function that runs the model.

    Returns:
        The name, None if all inputs are finite.
    """
    finite_at: dict[str, bool] = {}

    def check(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        finite_at.setdefault(name, bool(torch.isfinite(arguments[0]).all()))

    with ExitStack() as stack, torch.no_grad():
        for name, path in layers.items():
            stack.callback(model.get_submodule(path).register_forward_pre_hook(partial(check, name)).remove)
        run()
    return next((name for name, finite in finite_at.items() if not finite), None)
