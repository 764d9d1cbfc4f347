"""interpolated_norm in PyTorch. This is the specification. Autograd specifies the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur_kernels.backend import Norm, accumulator


def interpolated_norm_reference(
    r: Tensor,
    u: Tensor,
    bias: Tensor | None,
    nodes: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    kind: Norm,
    zeros: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `secateur_kernels.interpolated_norm` in PyTorch, without checks.

        residuals[k] = r + nodes[k] * u + bias
        normed[k]    = norm(residuals[k])

    Args:
        r: The start of the path [B, T, D], a floating dtype.
        u: The direction of the path [B, T, D].
        bias: A vector [D] that is added to all residuals, or None.
        nodes: The positions on the path [K] or [K, B].
        norm_weight: The norm's scale [D], or None.
        norm_bias: The norm's shift [D], or None.
        eps: The constant under the square root.
        kind: "rms_norm" or "layer_norm".
        zeros: Zeros [K, B, T, D], which get the gradient at each residual, or None.

    Returns:
        The residuals and their norms, both [K, B, T, D] in r's dtype.
    """
    accumulate = accumulator(r)
    nodes = nodes.to(accumulate)[:, None, None, None] if nodes.dim() == 1 else nodes.to(accumulate)[:, :, None, None]
    residuals = r.to(accumulate) + nodes * u.to(accumulate)  # [K, B, T, D]
    if bias is not None:
        residuals = residuals + bias.to(accumulate)
    if zeros is not None:
        residuals = residuals + zeros.to(accumulate)
    centred = residuals - residuals.mean(-1, keepdim=True) if kind == "layer_norm" else residuals
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if norm_weight is not None:
        normed = normed * norm_weight.to(accumulate)
    if norm_bias is not None:
        normed = normed + norm_bias.to(accumulate)
    return residuals.to(r.dtype), normed.to(r.dtype)
