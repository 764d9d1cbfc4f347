"""scored_mlp_backward: an MLP's gradients and its neurons' scores in one pass.

The gradients pass the MLP's out-projection and its activation.
"""

from secateur_kernels.scored_mlp_backward.api import scored_mlp_backward

__all__ = ["scored_mlp_backward"]
