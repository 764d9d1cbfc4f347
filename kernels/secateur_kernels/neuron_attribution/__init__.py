"""neuron_attribution: the scores of neurons from the gradient at the out-projection's output.

The gradients at the neurons are never stored.
"""

from secateur_kernels.neuron_attribution.api import neuron_attribution

__all__ = ["neuron_attribution"]
