"""The checked, public form of product_sum."""

from __future__ import annotations

from torch import Tensor

from secateur_kernels.product_sum.reference import product_sum_reference


def product_sum(x: Tensor, dx: Tensor, mask: Tensor | None = None) -> Tensor:
    """out[b, c] = sum over t of mask[b, t] * x[b, t, c] * dx[b, t, c].

    x, dx: [B, T, C], one floating dtype. mask: [B, T] or None. Returns [B, C], float32 (float64 for float64 inputs),
    accumulated in that dtype. With x an activation and dx its gradient this is dF/dc for a gate c on each channel
    (Yang et al. 2023, arXiv 2205.04157, Eq. 4-5). Raises ValueError: shapes or dtypes that do not agree.
    """
    if x.dim() != 3 or x.shape != dx.shape:
        raise ValueError(f"x, dx: expected two tensors [B, T, C] of one shape, got {tuple(x.shape)} and {tuple(dx.shape)}")
    if x.dtype != dx.dtype or not x.is_floating_point():
        raise ValueError(f"x, dx: expected one floating dtype, got {x.dtype} and {dx.dtype}")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"mask: expected shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    return product_sum_reference(x, dx, mask)
