"""Kernels of secateur: one folder an operation, each with the PyTorch reference that specifies it."""

from secateur_kernels.product_sum import product_sum

__all__ = ["product_sum"]
