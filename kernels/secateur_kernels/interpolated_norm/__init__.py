"""interpolated_norm: the points of a path between two residual streams and their norms, in one pass."""

from secateur_kernels.interpolated_norm.api import interpolated_norm

__all__ = ["interpolated_norm"]
