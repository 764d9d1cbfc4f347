"""neuron_attribution in PyTorch. This is the specification."""

from __future__ import annotations

from torch import Tensor

from secateur_kernels.backend import Reduction, accumulator


def neuron_attribution_reference(h: Tensor, g: Tensor, weight: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Compute `secateur_kernels.neuron_attribution` in PyTorch, without checks.

        out[b, f] = sum over t of mask[b, t] * r(h[b, t, f] * sum over d of g[b, t, d] * weight[d, f])

    Args:
        h: The input of the out-projection [B, T, F], a floating dtype.
        g: The gradient at its output [B, T, D].
        weight: The out-projection's weight [D, F].
        mask: A bool or a number for each token [B, T], or None.
        reduction: The function r: "sum" (identity), "abs_sum" (absolute value) or "square_sum" (square).

    Returns:
        The scores [B, F] in float32, or float64 for float64 inputs.
    """
    accumulate = accumulator(h)
    return reduce_tokens(h.to(accumulate) * (g.to(accumulate) @ weight.to(accumulate)), mask, reduction)


def reduce_tokens(scores: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Apply the reduction to scores and sum them over tokens.

    Args:
        scores: The scores of each token [B, T, F].
        mask: A bool or a number for each token [B, T], or None.
        reduction: "sum", "abs_sum" or "square_sum".

    Returns:
        The sums [B, F] in the dtype of the scores.
    """
    if reduction == "abs_sum":
        scores = scores.abs()
    elif reduction == "square_sum":
        scores = scores.square()
    if mask is not None:
        scores = scores * mask.unsqueeze(-1).to(scores)
    return scores.sum(1)
