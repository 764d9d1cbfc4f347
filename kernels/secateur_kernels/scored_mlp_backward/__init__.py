"""scored_mlp_backward: the gradient through an MLP's out-projection and activation, and its neurons' scores, in one pass."""

from secateur_kernels.scored_mlp_backward.api import scored_mlp_backward

__all__ = ["scored_mlp_backward"]
