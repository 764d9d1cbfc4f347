"""Gates on units: their gradients, by one forward and one backward pass, and activations scaled by a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn

from secateur.attribution.fused_ffn import FusedFeedForward
from secateur.model.branches import Port
from secateur.model.hooks import _intercepted
from secateur.model.sites import Site
from secateur_kernels import product_sum
from secateur_kernels.backend import Backend

Observer = Callable[[Tensor, Tensor], None]


def gate_gradients(
    model: nn.Module,
    ports: Mapping[Site, tuple[Port, ...]],
    target: Callable[[], Tensor],
    gate: Tensor | None = None,
    fused: Mapping[Site, FusedFeedForward] = MappingProxyType({}),
    *,
    backend: Backend,
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Compute F and its gradients at the gates by one forward and one backward pass.

    Args:
        model: The model. Its parameters must be frozen (`undisturbed`).
        ports: Where the units of each site are gated.
        target: Runs the model and returns F [B].
        gate: The value of all gates of each example [B], as in `watched`. None: all gates are 1.
        fused: Branches that may score their own units. They need gates of 1.
        backend: Of the kernels that sum over tokens.

    Returns:
        F [B], and dF/dc of each unit of each site [B, units].
    """
    scores: dict[Site, Tensor] = {}

    def observe(site: Site, port: Port, activation: Tensor, gradient: Tensor) -> None:
        folded = port.map.fold(product_sum(activation, gradient, backend=backend))
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
