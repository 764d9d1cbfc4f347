"""product_sum: the sum over tokens of activation times gradient, for each example and channel."""

from secateur_kernels.product_sum.api import product_sum

__all__ = ["product_sum"]
