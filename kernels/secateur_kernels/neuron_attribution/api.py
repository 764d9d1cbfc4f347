"""The public function neuron_attribution, which checks its arguments and chooses a backend."""

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
    allow_tf32: bool | None = None,
) -> Tensor:
    """Score each neuron of an out-projection's input by activation times gradient, summed over tokens.

        out[b, f] = sum over t of mask[b, t] * r(h[b, t, f] * sum over d of g[b, t, d] * weight[d, f])

    This is dF/dc for a gate c on each neuron. r is the identity, the absolute value or the square. With Triton, the gradient
    g @ weight [B, T, F] is never written.

    Args:
        h: The input of the out-projection [B, T, F], a floating dtype, any strides.
        g: The gradient at its output [B, T, D], in the dtype of h, any strides.
        weight: The out-projection's weight [D, F], as in `nn.Linear(F, D)`, in the dtype of h.
        mask: A bool or a number for each token [B, T], or None.
        reduction: The function r: "sum" (identity), "abs_sum" (absolute value) or "square_sum" (square).
        backend: The implementation, see `secateur_kernels.backend.uses_triton`.
        allow_tf32: Whether the Triton kernel may use tf32, with 10 bits of mantissa, for float32 products. None follows
            PyTorch's setting `torch.backends.cuda.matmul.fp32_precision` (or `allow_tf32`) at the time of the call.

    Returns:
        The scores [B, F] in float32 (float64 for float64 inputs). They are accumulated in that dtype. With Triton they are not
        differentiable. Triton copies h and g if their last dimension has gaps or B and T cannot be merged.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree, or the backend cannot run.

    Reference:
        Yang et al. 2023, arXiv 2205.04157, Eq. 4-5, with the chain rule written out.
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
def _neuron_attribution(
    h: Tensor, g: Tensor, weight: Tensor, mask: Tensor | None, reduction: str, allow_tf32: bool | None
) -> Tensor:
    """Run the Triton kernel as one operator, which torch.compile and torch.export do not trace into."""
    from secateur_kernels.neuron_attribution.triton import launch

    return launch(h, g, weight, mask, reduction, allow_tf32)


@_neuron_attribution.register_fake
def _(h: Tensor, *rest: Any) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[2], dtype=torch.float32)
