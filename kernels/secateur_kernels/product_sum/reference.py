"""product_sum in PyTorch. This is the specification."""

from __future__ import annotations

from torch import Tensor

from secateur_kernels.backend import accumulator


def product_sum_reference(x: Tensor, dx: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute `secateur_kernels.product_sum` in PyTorch, without checks.

        out[b, c] = sum over t of mask[b, t] * x[b, t, c] * dx[b, t, c]

    Args:
        x: The activation [B, T, C], a floating dtype.
        dx: The gradient [B, T, C].
        mask: A bool or a number for each token [B, T], or None.

    Returns:
        The sums [B, C] in float32, or float64 for float64 inputs.
    """
    product = x.to(accumulator(x)) * dx.to(accumulator(x))  # [B, T, C]
    if mask is not None:
        product = product * mask.unsqueeze(-1).to(product)
    return product.sum(1)
