"""Gates on units: their gradients by one forward and one backward pass, and activations that a gate multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn

from secateur.attribution.fused_ffn import FusedFeedForward
from secateur.model.branches import Port
from secateur.model.hooks import intercepted
from secateur.model.sites import Site
from secateur_kernels import product_sum
from secateur_kernels.backend import Backend

Observer = Callable[[Tensor, Tensor], None]


def gate_gradients(
    model: nn.Module,
    ports: Mapping[Site, tuple[Port, ...]],
    target: Callable[[], Tensor],
    gate: Tensor | Mapping[Site, Tensor] | None = None,
    fused: Mapping[Site, FusedFeedForward] = MappingProxyType({}),
    *,
    backend: Backend,
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Compute F and its gradients with respect to the gates, by one forward and one backward pass.

    Args:
        model: The model. Its parameters must be frozen (`undisturbed`).
        ports: The ports at which the units of each site are gated.
        target: A function that runs the model and returns F [B].
        gate: For each example, the value of all its gates [B], or by site the value of each gate [B, units]. None means that
            all gates are 1.
        fused: Branches that may score their own units. They take no gates by site.
        backend: The implementation of the kernels that sum over tokens.

    Returns:
        F [B], and dF/dc of each unit [B, units] by site.

    Reference:
        Yang et al. 2023, arXiv 2205.04157, Eq. 4-5: dF/dc = sum over tokens t of h[t] * dF/dh[t] at a gate of 1.
    """
    of_site = gate if isinstance(gate, Mapping) else dict.fromkeys(ports, gate)
    scores: dict[Site, Tensor] = {}

    def observe(site: Site, port: Port, activation: Tensor, gradient: Tensor) -> None:
        folded = port.map.fold(product_sum(activation, gradient, backend=backend))  # [B, channels] -> [B, units]
        scores[site] = scores[site] + folded if site in scores else folded

    with ExitStack() as stack:
        watches: dict[Port, Callable[[Tensor], Tensor]] = {}
        for site, ports_of_site in ports.items():
            for port in ports_of_site:
                watches[port] = _watch(port, partial(observe, site, port), of_site[site])
            if site in fused:
                watch = watches.pop(ports_of_site[0])
                stack.enter_context(fused[site].scored(watch, partial(scores.__setitem__, site), of_site[site]))
        stack.enter_context(intercepted(model, watches))
        value = target()
    value.sum().backward()  # type: ignore[no-untyped-call]
    return value.detach(), {site: scores[site] for site in ports}


def _watch(port: Port, observe: Observer, gate: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies a port's activation [B, T, channels] by its gates, and hooks an observer to it.

    The observer gets the activation before this product and the gradient after it. If no tensor below the port needs a
    gradient, the graph starts at the port. Then the layers below are not differentiated.
    """

    def watch(activation: Tensor) -> Tensor:
        detached = activation.detach()  # A hook that held the tensor with its graph would form a reference cycle.
        if gate is not None:
            activation = port.map.times(activation, gate)
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_(True)
        activation.register_hook(lambda gradient: observe(detached, gradient))  # type: ignore[no-untyped-call]
        return activation

    return watch


@contextmanager
def scaled(model: nn.Module, ports: Iterable[Port], gate: Tensor) -> Iterator[None]:
    """Multiply the activations at the ports by each example's gate, inside the context.

    Args:
        model: The model.
        ports: The ports.
        gate: A value for each example [B].

    Yields:
        Nothing. The hooks are removed at the end of the context.
    """
    with intercepted(model, {port: partial(port.map.times, gate=gate) for port in ports}):
        yield
