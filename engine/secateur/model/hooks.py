"""Hooks on ports: observe or replace the activations of units. No hook stays on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.model.branches import Port


@contextmanager
def observed(model: nn.Module, ports: Mapping[Port, Callable[[Tensor], None]]) -> Iterator[None]:
    """A context in which a forward pass calls each port's observer with the activation [B, T, channels]."""

    def look(observe: Callable[[Tensor], None], activation: Tensor) -> Tensor:
        observe(activation)
        return activation

    with intercepted(model, {port: partial(look, observe) for port, observe in ports.items()}):
        yield


@contextmanager
def intercepted(model: nn.Module, transforms: Mapping[Port, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """A context in which each port's function replaces the activation [B, T, channels] that goes through the port."""
    handles: list[RemovableHandle] = []
    try:
        for port, transform in transforms.items():
            handles.append(_hook(model.get_submodule(port.path), port, transform))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, port: Port, transform: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Hook the side of a linear layer that a port names."""
    if port.side == "input":

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (transform(arguments[0]), *arguments[1:])

        return module.register_forward_pre_hook(before)

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return transform(output)

    return module.register_forward_hook(after)


@contextmanager
def replaced(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """A context in which the modules at these paths call these functions instead of their own forward."""
    with ExitStack() as stack:
        for path, forward in forwards.items():
            module = model.get_submodule(path)
            if "forward" in vars(module):  # Another library has wrapped the forward of this module.
                stack.callback(setattr, module, "forward", vars(module)["forward"])
            else:
                stack.callback(delattr, module, "forward")
            module.forward = forward
        yield


def returning(value: Any) -> Callable[..., Any]:
    """Return a function for `replaced` that returns a value, whatever its arguments are."""
    return lambda *arguments, **options: value


def states_of(output: Any) -> Tensor:
    """Return the states [B, T, channels] in what a block returns: a tensor, or a tuple that begins with it."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states
