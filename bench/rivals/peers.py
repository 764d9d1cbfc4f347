"""Integrated gradients as they are computed elsewhere: a loop of full passes, and Captum on the same function of the site."""

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
    """Right Riemann sum: hook, scale, a full forward and backward pass a step. [B, units]"""
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
    """Captum's IntegratedGradients with its default rule (Gauss-Legendre), passes of at most `tokens` tokens. [B, units]"""
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

    def of_site(activation: Tensor, labels: Tensor, *inputs: Tensor) -> Tensor:
        # The rows are the batch's, repeated: what is not by row (`extra`) stays as it is.
        expanded = Batch(dict(zip(names, inputs, strict=True)), labels, [], batch.extra)
        with _input_of(model, port, lambda _: activation):
            return task.target(model, expanded, target)

    size = max(1, tokens // batch.inputs["input_ids"].shape[1])
    found = IntegratedGradients(of_site, multiply_by_inputs=True).attribute(
        seen[0],
        baselines=0.0,
        additional_forward_args=(batch.labels, *batch.inputs.values()),
        n_steps=steps,
        internal_batch_size=max(size, len(batch.labels)),
    )
    return port.map.fold(found.detach().sum(1))


def _port(model: nn.Module, site: Site) -> Port:
    (port,) = branches_of(model, [site])[site].gated_at(site.unit)
    return port


@contextmanager
def _input_of(model: nn.Module, port: Port, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = model.get_submodule(port.path).register_forward_pre_hook(lambda module, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
