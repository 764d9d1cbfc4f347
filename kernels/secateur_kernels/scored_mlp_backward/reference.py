"""scored_mlp_backward in PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from secateur_kernels.backend import Activation, Reduction, accumulator
from secateur_kernels.neuron_attribution.reference import reduce_tokens

aten = torch.ops.aten

# The function, and its gradient from the gradient at its output and its input.
ACTIVATIONS: dict[Activation, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (functional.relu, lambda gradient, x: aten.threshold_backward(gradient, x, 0)),
    "gelu": (functional.gelu, lambda gradient, x: aten.gelu_backward(gradient, x)),
    "gelu_new": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda gradient, x: aten.gelu_backward(gradient, x, approximate="tanh"),
    ),
    "silu": (functional.silu, lambda gradient, x: aten.silu_backward(gradient, x)),
}


def scored_mlp_backward_reference(
    g: Tensor, weight: Tensor, pre: Tensor, up: Tensor | None, mask: Tensor | None, activation: Activation, reduction: Reduction
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `secateur_kernels.scored_mlp_backward`."""
    accumulate = accumulator(g)
    function, backward = ACTIVATIONS[activation]
    dh = g.to(accumulate) @ weight.to(accumulate)
    wide = pre.to(accumulate)
    activated = function(wide)
    if up is None:
        return backward(dh, wide).to(pre.dtype), None, reduce_tokens(activated * dh, mask, reduction)
    scores = reduce_tokens(activated * up.to(accumulate) * dh, mask, reduction)
    return backward(dh * up.to(accumulate), wide).to(pre.dtype), (dh * activated).to(pre.dtype), scores
