"""scored_mlp_backward in PyTorch. This is the specification."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from secateur_kernels.backend import Activation, Reduction, accumulator
from secateur_kernels.neuron_attribution.reference import reduce_tokens

aten = torch.ops.aten

# The activation, and its backward function: (gradient at the output, input) -> gradient at the input.
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
    """Compute `secateur_kernels.scored_mlp_backward` in PyTorch, without checks.

        dh     = g @ weight
        dpre   = dh * act'(pre), or dh * up * act'(pre) in a gated MLP
        dup    = dh * act(pre)
        scores = sum over t of mask[b, t] * r(h * dh), with h = act(pre), or act(pre) * up in a gated MLP

    Args:
        g: The gradient at the MLP's output [B, T, D], a floating dtype.
        weight: The out-projection's weight [D, F].
        pre: The input of the activation [B, T, F].
        up: The factor of a gated MLP [B, T, F], or None.
        mask: A bool or a number for each token [B, T], or None.
        activation: The activation.
        reduction: The function r, as in `neuron_attribution`.

    Returns:
        dpre [B, T, F], dup [B, T, F] or None, both in the dtype of `pre`, and the scores [B, F] in float32, or float64 for
        float64 inputs.
    """
    accumulate = accumulator(g)
    function, backward = ACTIVATIONS[activation]
    dh = g.to(accumulate) @ weight.to(accumulate)  # [B, T, F]
    pre_accumulated = pre.to(accumulate)
    activated = function(pre_accumulated)
    if up is None:
        return backward(dh, pre_accumulated).to(pre.dtype), None, reduce_tokens(activated * dh, mask, reduction)
    scores = reduce_tokens(activated * up.to(accumulate) * dh, mask, reduction)
    return backward(dh * up.to(accumulate), pre_accumulated).to(pre.dtype), (dh * activated).to(pre.dtype), scores
