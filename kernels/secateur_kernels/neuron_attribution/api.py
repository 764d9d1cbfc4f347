"""The checked, public form of neuron_attribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur_kernels.backend import (
    Backend,
    Reduction,
    check_alike,
    check_device,
    check_dimensions,
    check_one_of,
    check_shape,
    uses_triton,
)
from secateur_kernels.neuron_attribution.reference import neuron_attribution_reference


def neuron_attribution(
    h: Tensor,
    g: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "sum",
    *,
    backend: Backend = "auto",
    allow_tf32: bool = False,
) -> Tensor:
    """out[b, f] = sum over t of mask[b, t] * r(h[b, t, f] * sum over d of g[b, t, d] * weight[d, f]).

    r: what it is given (reduction="sum"), its absolute value ("abs_sum") or its square ("square_sum").
    h: [B, T, F], the input of an out-projection. g: [B, T, D], the gradient at its output. weight: [D, F], as in
    `nn.Linear(F, D)`. One floating dtype; any strides: h and g are copied where their last dimension has holes or B and T
    cannot be merged. mask: [B, T], a bool or number for each token, or None. Returns [B, F], float32 (float64 for float64
    inputs), accumulated in that dtype; not differentiable with Triton. With Triton the gradient g @ weight [B, T, F] is never
    written. allow_tf32: whether float32 products may use tf32 there, with 10 bits of mantissa.
    This is dF/dc for a gate c on each neuron (Yang et al. 2023, arXiv 2205.04157, Eq. 4-5, its chain rule written out).
    backend: see `secateur_kernels.backend.uses_triton`. Raises ValueError: shapes, dtypes or devices that do not agree.
    """
    check_dimensions("h", h, "B, T, F")
    check_dimensions("g", g, "B, T, D")
    batch, tokens, neurons = h.shape
    check_shape("g", g, batch, tokens, g.shape[2])
    check_shape("weight", weight, g.shape[2], neurons)
    check_shape("mask", mask, batch, tokens)
    check_alike(h=h, g=g, weight=weight)
    check_device(h=h, mask=mask)
    check_one_of("reduction", reduction, Reduction)
    if uses_triton(backend, h):
        out: Tensor = _neuron_attribution(h, g, weight, mask, reduction, allow_tf32)
        return out
    return neuron_attribution_reference(h, g, weight, mask, reduction)


@torch.library.custom_op("secateur::neuron_attribution", mutates_args=())
def _neuron_attribution(h: Tensor, g: Tensor, weight: Tensor, mask: Tensor | None, reduction: str, allow_tf32: bool) -> Tensor:
    from secateur_kernels.neuron_attribution.triton import launch

    return launch(h, g, weight, mask, reduction, allow_tf32)


@_neuron_attribution.register_fake
def _(h: Tensor, *rest: Any) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[2], dtype=torch.float32)
