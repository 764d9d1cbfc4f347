"""The public function product_sum, which checks its arguments and chooses a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur_kernels.backend import Backend, check_alike, check_device, check_shape, uses_triton
from secateur_kernels.product_sum.reference import product_sum_reference


def product_sum(x: Tensor, dx: Tensor, mask: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """Sum activation times gradient over the tokens of each example.

        out[b, c] = sum over t of mask[b, t] * x[b, t, c] * dx[b, t, c]

    If x is an activation and dx is its gradient, this is dF/dc for a gate c on each channel.

    Args:
        x: The activation [B, T, C], a floating dtype, any strides.
        dx: The gradient [B, T, C], in the dtype of x, any strides.
        mask: A bool or a number for each token [B, T], or None.
        backend: The implementation, see `secateur_kernels.backend.uses_triton`.

    Returns:
        The sums [B, C] in float32 (float64 for float64 inputs). They are accumulated in that dtype. With Triton they are not
        differentiable.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree, or the backend cannot run.

    Reference:
        Yang et al. 2023, arXiv 2205.04157, Eq. 4-5.
    """
    if x.dim() != 3 or x.shape != dx.shape:
        raise ValueError(f"x, dx: expected two tensors [B, T, C] of one shape, got {tuple(x.shape)} and {tuple(dx.shape)}")
    check_alike(x=x, dx=dx)
    check_shape("mask", mask, *x.shape[:2])
    check_device(x=x, mask=mask)
    if uses_triton(backend, x):
        out: Tensor = _product_sum(x, dx, mask)
        return out
    return product_sum_reference(x, dx, mask)


@torch.library.custom_op("secateur::product_sum", mutates_args=())
def _product_sum(x: Tensor, dx: Tensor, mask: Tensor | None) -> Tensor:
    """Run the Triton kernel as one operator, which torch.compile and torch.export do not trace into."""
    from secateur_kernels.product_sum.triton import launch

    return launch(x, dx, mask)


@_product_sum.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)
