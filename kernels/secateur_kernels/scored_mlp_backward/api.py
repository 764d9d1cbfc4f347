"""The checked, public form of scored_mlp_backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur_kernels.backend import (
    Activation,
    Backend,
    Reduction,
    check_alike,
    check_device,
    check_dimensions,
    check_one_of,
    check_shape,
    uses_triton,
)
from secateur_kernels.scored_mlp_backward.reference import scored_mlp_backward_reference


def scored_mlp_backward(
    g: Tensor,
    weight: Tensor,
    pre: Tensor,
    up: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    activation: Activation,
    reduction: Reduction = "sum",
    backend: Backend = "auto",
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients at an MLP's pre-activations, and its neurons' scores.

    The MLP's output is h @ weight.T with h = act(pre), or act(pre) * up where it is gated. With dh = g @ weight:
        dpre   = dh * act'(pre), or dh * up * act'(pre)       [B, T, F], in the inputs' dtype, rounded once
        dup    = dh * act(pre)                                the same; None without `up`
        scores = sum over t of mask[b, t] * r(h * dh)         [B, F], as `neuron_attribution` has it
    With Triton neither h nor dh is written. The mask weighs scores alone, not gradients.

    g: [B, T, D], the gradient at the MLP's output. weight: [D, F], as in `nn.Linear(F, D)`. pre, up: [B, T, F]. One floating
    dtype; any strides: all but the weight are copied where their last dimension has holes or B and T cannot be merged. mask:
    [B, T], a bool or number for each token, or None. activation: "relu", "gelu" (with the error function), "gelu_new" (with
    the hyperbolic tangent; Hendrycks and Gimpel 2016, arXiv 1606.08415) or "silu". Gated: Shazeer 2020, arXiv 2002.05202.
    Scores are float32 (float64 for float64 inputs), everything accumulated in that dtype. Not differentiable with Triton.
    reduction, allow_tf32, backend: as in `neuron_attribution`. Raises ValueError: shapes, dtypes or devices that do not agree.
    """
    check_dimensions("g", g, "B, T, D")
    check_dimensions("pre", pre, "B, T, F")
    batch, tokens, neurons = pre.shape
    check_shape("g", g, batch, tokens, g.shape[2])
    check_shape("weight", weight, g.shape[2], neurons)
    check_shape("up", up, batch, tokens, neurons)
    check_shape("mask", mask, batch, tokens)
    check_alike(g=g, weight=weight, pre=pre, up=up)
    check_device(g=g, mask=mask)
    check_one_of("activation", activation, Activation)
    check_one_of("reduction", reduction, Reduction)
    if uses_triton(backend, g):
        *gradients, scores = _scored_mlp_backward(g, weight, pre, up, mask, activation, reduction, allow_tf32)
        return gradients[0], None if up is None else gradients[1], scores
    return scored_mlp_backward_reference(g, weight, pre, up, mask, activation, reduction)


@torch.library.custom_op("secateur::scored_mlp_backward", mutates_args=())
def _scored_mlp_backward(
    g: Tensor,
    weight: Tensor,
    pre: Tensor,
    up: Tensor | None,
    mask: Tensor | None,
    activation: str,
    reduction: str,
    allow_tf32: bool,
) -> list[Tensor]:
    from secateur_kernels.scored_mlp_backward.triton import launch

    return launch(g, weight, pre, up, mask, activation, reduction, allow_tf32)


@_scored_mlp_backward.register_fake
def _(g: Tensor, weight: Tensor, pre: Tensor, up: Tensor | None, *rest: Any) -> list[Tensor]:
    gradients = [pre.new_empty(pre.shape) for _ in range(1 if up is None else 2)]
    return [*gradients, pre.new_empty(pre.shape[0], pre.shape[2], dtype=torch.float32)]
