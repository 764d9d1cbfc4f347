"""Kernels of secateur. Each operation has a folder with its public function, its PyTorch reference and its Triton kernel.

The reference specifies the operation.
"""

from secateur_kernels.interpolated_norm import interpolated_norm
from secateur_kernels.neuron_attribution import neuron_attribution
from secateur_kernels.product_sum import product_sum
from secateur_kernels.scored_mlp_backward import scored_mlp_backward

__all__ = ["interpolated_norm", "neuron_attribution", "product_sum", "scored_mlp_backward"]
