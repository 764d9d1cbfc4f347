"""product_sum in PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def product_sum_reference(x: Tensor, dx: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `secateur_kernels.product_sum`."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    product = x.to(accumulate) * dx.to(accumulate)
    if mask is not None:
        product = product * mask.unsqueeze(-1)
    return product.sum(1)
