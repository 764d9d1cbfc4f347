"""neuron_attribution in PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor

from secateur_kernels.backend import Reduction, accumulator


def neuron_attribution_reference(h: Tensor, g: Tensor, weight: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """See `secateur_kernels.neuron_attribution`."""
    accumulate = accumulator(h)
    return reduce_tokens(h.to(accumulate) * (g.to(accumulate) @ weight.to(accumulate)), mask, reduction)


def reduce_tokens(scores: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """[B, T, F] to [B, F]."""
    if reduction == "abs_sum":
        scores = scores.abs()
    elif reduction == "square_sum":
        scores = scores.square()
    if mask is not None:
        scores = scores * mask.unsqueeze(-1).to(scores)
    return scores.sum(1)
