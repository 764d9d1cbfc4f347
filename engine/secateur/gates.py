"""Gates on a model's units: watching their activations and gradients, and setting them to zero. Nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.discovery import scored_ports
from secateur.families import in_rows
from secateur.fused import FusedFeedForward
from secateur.planning import Plan
from secateur.site import Port, Site
from secateur_kernels import product_sum

Observer = Callable[[Tensor, Tensor], None]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode, frozen parameters, activations by example; each module's mode and each parameter's flag are put back.

    So are the parameters themselves: Accelerate makes new ones at each pass of what it offloads, which are tied no more.
    """
    modes = {module: module.training for module in model.modules()}
    own = {module: dict(module._parameters) for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = in_rows(model)
    try:
        model.eval()
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
            module._parameters.update(own[module])
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def gate_gradients(
    model: nn.Module,
    ports: Mapping[Site, tuple[Port, ...]],
    target: Callable[[], Tensor],
    gate: Tensor | None = None,
    fused: Mapping[Site, FusedFeedForward] = MappingProxyType({}),
) -> tuple[Tensor, dict[Site, Tensor]]:
    """F [B], and dF/dc of each unit of each site [B, units], by one forward and one backward pass.

    target: runs the model and returns F. gate: as in `watched`, the value of all gates. fused: branches that may score their
    own units (all gates 1). The model's parameters must be frozen (`undisturbed`).
    """
    scores: dict[Site, Tensor] = {}

    def observe(site: Site, port: Port, activation: Tensor, gradient: Tensor) -> None:
        folded = port.map.fold(product_sum(activation, gradient))
        scores[site] = scores[site] + folded if site in scores else folded

    observers = {port: partial(observe, site, port) for site, each in ports.items() if site not in fused for port in each}
    with ExitStack() as stack:
        for site, branch in fused.items():
            (port,) = ports[site]
            stack.enter_context(
                branch.scored(_watch(port, partial(observe, site, port), None), partial(scores.__setitem__, site))
            )
        stack.enter_context(watched(model, observers, gate))
        value = target()
    value.sum().backward()  # type: ignore[no-untyped-call]
    return value.detach(), {site: scores[site] for site in ports}


@contextmanager
def watched(model: nn.Module, ports: Mapping[Port, Observer], gate: Tensor | None = None) -> Iterator[None]:
    """Calls each port's observer with (activation, gradient), both [B, T, channels], during the backward pass.

    gate [B]: multiplies the activations of each example; the observers see the activation before and the gradient after.
    Where nothing below a port needs a gradient the graph starts at the port: what lies below is never differentiated.
    """
    with _intercepted(model, {port: _watch(port, observe, gate) for port, observe in ports.items()}):
        yield


def _watch(port: Port, observe: Observer, gate: Tensor | None) -> Callable[[Tensor], Tensor]:
    def watch(activation: Tensor) -> Tensor:
        held = activation.detach()  # Without its graph: a hook that held the tensor itself would be a reference cycle.
        if gate is not None:
            activation = port.map.times(activation, gate)
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_(True)
        activation.register_hook(lambda gradient: observe(held, gradient))  # type: ignore[no-untyped-call]
        return activation

    return watch


@contextmanager
def scaled(model: nn.Module, ports: Iterable[Port], gate: Tensor) -> Iterator[None]:
    """Inside, the activations at the ports are multiplied by each example's gate [B]."""
    with _intercepted(model, {port: partial(port.map.times, gate=gate) for port in ports}):
        yield


@contextmanager
def observed(model: nn.Module, ports: Mapping[Port, Callable[[Tensor], None]]) -> Iterator[None]:
    """Calls each port's observer with the activation [B, T, channels] during the forward pass."""

    def look(observe: Callable[[Tensor], None], activation: Tensor) -> Tensor:
        observe(activation)
        return activation

    with _intercepted(model, {port: partial(look, observe) for port, observe in ports.items()}):
        yield


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[None]:
    """The masked model: inside, the units that the plan removes have activation zero. The pruned model's specification."""

    def transform(port: Port, kept: Tensor, units: int) -> Callable[[Tensor], Tensor]:
        mask = torch.zeros(units)
        mask[kept] = 1
        channels = port.map.expand(mask)
        return lambda activation: activation * channels.to(activation)

    transforms = {
        port: transform(port, plan[site.name], site.units)
        for site, ports in scored_ports(model, plan.sites).items()
        for port in ports
        if len(plan[site.name]) < site.units
    }
    with _intercepted(model, transforms):
        yield


@contextmanager
def _intercepted(model: nn.Module, transforms: Mapping[Port, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replaces what goes through each port by what its function returns."""
    handles: list[RemovableHandle] = []
    try:
        for port, transform in transforms.items():
            handles.append(_hook(model.get_submodule(port.path), port, transform))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, port: Port, transform: Callable[[Tensor], Tensor]) -> RemovableHandle:
    if port.side == "input":

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (transform(arguments[0]), *arguments[1:])

        return module.register_forward_pre_hook(before)

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return transform(output)

    return module.register_forward_hook(after)
