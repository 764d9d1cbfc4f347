"""interpolated_norm in PyTorch: the specification, and by autograd that of its gradients."""

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
) -> tuple[Tensor, Tensor]:
    """See `secateur_kernels.interpolated_norm`."""
    accumulate = accumulator(r)
    nodes = nodes.to(accumulate)[:, None, None, None] if nodes.dim() == 1 else nodes.to(accumulate)[:, :, None, None]
    residuals = r.to(accumulate) + nodes * u.to(accumulate)
    if bias is not None:
        residuals = residuals + bias.to(accumulate)
    centred = residuals - residuals.mean(-1, keepdim=True) if kind == "layer_norm" else residuals
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if norm_weight is not None:
        normed = normed * norm_weight.to(accumulate)
    if norm_bias is not None:
        normed = normed + norm_bias.to(accumulate)
    return residuals.to(r.dtype), normed.to(r.dtype)
