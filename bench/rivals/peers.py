"""Integrated gradients by other implementations: a loop of full passes, and Captum on the same function of the site."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.branches import Port
from secateur.model.discovery import branches_of
from secateur.model.sites import Site
from secateur.tasks import Batch, Task


def riemann(model: nn.Module, task: Task, batch: Batch, site: Site, steps: int, target: Any) -> Tensor:
    """Return a right Riemann sum [B, units].

    Each step hooks and scales the activation and runs a full forward and backward pass.
    """
    port = _port(model, site)
    total: Any = 0
    for step in range(1, steps + 1):
        seen: dict[str, Tensor] = {}

        def scale(activation: Tensor, step: int = step, seen: dict[str, Tensor] = seen) -> Tensor:
            seen["activation"] = activation.detach()
            seen["scaled"] = (activation.detach() * (step / steps)).requires_grad_(True)
            return seen["scaled"]

        with _input_of(model, port, scale):
            (gradient,) = torch.autograd.grad(task.target(model, batch, target).sum(), seen["scaled"])
        total = total + seen["activation"] * gradient / steps
    return port.map.fold(total.sum(1))


def captum(model: nn.Module, task: Task, batch: Batch, site: Site, steps: int, target: Any, tokens: int) -> Tensor:
    """Return the scores [B, units] of Captum's IntegratedGradients with its default rule (Gauss-Legendre).

    A pass has at most `tokens` tokens.
    """
    from captum.attr import IntegratedGradients

    port = _port(model, site)
    with torch.no_grad():
        seen: list[Tensor] = []

        def keep(activation: Tensor) -> Tensor:
            seen.append(activation)
            return activation

        with _input_of(model, port, keep):
            task.target(model, batch, target)
    names = list(batch.inputs)

    def target_of_activation(activation: Tensor, labels: Tensor, *inputs: Tensor) -> Tensor:
        # Captum repeats the rows of the batch. `extra` is not per row, so it stays as it is.
        expanded = Batch(dict(zip(names, inputs, strict=True)), labels, [], batch.extra)
        with _input_of(model, port, lambda _: activation):
            return task.target(model, expanded, target)

    rows_per_pass = max(1, tokens // batch.inputs["input_ids"].shape[1])
    attributions = IntegratedGradients(target_of_activation, multiply_by_inputs=True).attribute(
        seen[0],
        baselines=0.0,
        additional_forward_args=(batch.labels, *batch.inputs.values()),
        n_steps=steps,
        internal_batch_size=max(rows_per_pass, len(batch.labels)),
    )
    return port.map.fold(attributions.detach().sum(1))


def _port(model: nn.Module, site: Site) -> Port:
    """Return the port whose input the site's gates multiply."""
    (port,) = branches_of(model, [site])[site].gated_at(site.unit)
    return port


@contextmanager
def _input_of(model: nn.Module, port: Port, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the input of a port's module inside the context."""
    handle = model.get_submodule(port.path).register_forward_pre_hook(lambda module, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
