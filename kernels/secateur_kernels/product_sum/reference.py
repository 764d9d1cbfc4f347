"""product_sum in PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor

from secateur_kernels.backend import accumulator


def product_sum_reference(x: Tensor, dx: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `secateur_kernels.product_sum`."""
    product = x.to(accumulator(x)) * dx.to(accumulator(x))
    if mask is not None:
        product = product * mask.unsqueeze(-1).to(product)
    return product.sum(1)
