"""The public function scored_mlp_backward, which checks its arguments and chooses a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secateur_kernels.backend import (
    Activation,
    Backend,
    Reduction,
    check_alike,
    check_device,
    check_dimensions,
    check_one_of,
    check_shape,
    uses_tf32,
    uses_triton,
)
from secateur_kernels.scored_mlp_backward.reference import scored_mlp_backward_reference


def scored_mlp_backward(
    g: Tensor,
    weight: Tensor,
    pre: Tensor,
    up: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    activation: Activation,
    reduction: Reduction = "sum",
    backend: Backend = "auto",
    allow_tf32: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute the gradients at an MLP's pre-activations and the scores of its neurons.

    The MLP's output is h @ weight.T. h = act(pre), or act(pre) * up in a gated MLP. With dh = g @ weight:

        dpre   = dh * act'(pre), or dh * up * act'(pre) in a gated MLP
        dup    = dh * act(pre)
        scores = sum over t of mask[b, t] * r(h * dh)

    With Triton, h is not written. Two implementations are timed at the first call for a shape, and the faster one is kept on
    disk. One kernel keeps dh in its registers. The other one takes PyTorch's matrix product, which rounds dh to the dtype of g
    as PyTorch's own backward does. The mask weights the scores, but not the gradients.

    Args:
        g: The gradient at the MLP's output [B, T, D], a floating dtype, any strides.
        weight: The out-projection's weight [D, F], as in `nn.Linear(F, D)`, in the dtype of g.
        pre: The input of the activation [B, T, F], in the dtype of g, any strides.
        up: The factor of a gated MLP [B, T, F], in the dtype of g, any strides, or None for a plain MLP.
        mask: A bool or a number for each token [B, T], or None.
        activation: "relu", "gelu" (with the error function), "gelu_new" (with the hyperbolic tangent) or "silu".
        reduction: The function r, as in `neuron_attribution`.
        backend: The implementation, see `secateur_kernels.backend.uses_triton`.
        allow_tf32: Whether the Triton kernel may use tf32, with 10 bits of mantissa, for float32 products. None follows
            PyTorch's setting `torch.backends.cuda.matmul.fp32_precision` (or `allow_tf32`) at the time of the call.

    Returns:
        dpre [B, T, F] and dup [B, T, F] in the dtype of the inputs, and the scores [B, F] in float32 (float64 for
        float64 inputs). dup is None without `up`. All sums are accumulated in the dtype of the scores. With Triton the results
        are not differentiable. Triton copies all inputs but the weight if their last dimension has gaps or B and T cannot be
        merged.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree, or the backend cannot run.

    Reference:
        GELU: Hendrycks and Gimpel 2016, arXiv 1606.08415. Gated MLPs: Shazeer 2020, arXiv 2002.05202. Scores: Yang et al. 2023,
        arXiv 2205.04157, Eq. 4-5.
    """
    check_dimensions("g", g, "B, T, D")
    check_dimensions("pre", pre, "B, T, F")
    batch, tokens, neurons = pre.shape
    check_shape("g", g, batch, tokens, g.shape[2])
    check_shape("weight", weight, g.shape[2], neurons)
    check_shape("up", up, batch, tokens, neurons)
    check_shape("mask", mask, batch, tokens)
    check_alike(g=g, weight=weight, pre=pre, up=up)
    check_device(g=g, mask=mask)
    check_one_of("activation", activation, Activation)
    check_one_of("reduction", reduction, Reduction)
    if uses_triton(backend, g):
        *gradients, scores = _scored_mlp_backward(g, weight, pre, up, mask, activation, reduction, allow_tf32)
        return gradients[0], None if up is None else gradients[1], scores
    return scored_mlp_backward_reference(g, weight, pre, up, mask, activation, reduction)


@torch.library.custom_op("secateur::scored_mlp_backward", mutates_args=())
def _scored_mlp_backward(
    g: Tensor,
    weight: Tensor,
    pre: Tensor,
    up: Tensor | None,
    mask: Tensor | None,
    activation: str,
    reduction: str,
    allow_tf32: bool | None,
) -> list[Tensor]:
    """Run the faster Triton implementation as one operator, which torch.compile and torch.export do not trace into."""
    from secateur_kernels.chosen import chosen
    from secateur_kernels.scored_mlp_backward.triton import launch
    from secateur_kernels.scored_mlp_backward.two_steps import launch_two_steps
    from secateur_kernels.tiles import size_class

    ways: dict[str, Callable[[], list[Tensor]]] = {
        "one kernel": lambda: launch(g, weight, pre, up, mask, activation, reduction, allow_tf32)
    }
    # PyTorch's product follows its own setting of tf32.
    if g.dtype != torch.float32 or uses_tf32(allow_tf32) == uses_tf32(None):
        ways["two steps"] = lambda: launch_two_steps(g, weight, pre, up, mask, activation, reduction)
    key = {
        "dtype": str(g.dtype), "rows": size_class(g.shape[0] * g.shape[1]), "tokens": min(g.shape[1], 256),
        "weight": [*weight.shape, *weight.stride()], "gated": up is not None, "masked": mask is not None,
        "activation": activation, "reduction": reduction, "tf32": g.dtype == torch.float32 and uses_tf32(allow_tf32),
    }  # fmt: skip
    return ways[chosen("scored_mlp_backward", key, ways, g.device)]()


@_scored_mlp_backward.register_fake
def _(g: Tensor, weight: Tensor, pre: Tensor, up: Tensor | None, *rest: Any) -> list[Tensor]:
    gradients = [pre.new_empty(pre.shape) for _ in range(1 if up is None else 2)]
    return [*gradients, pre.new_empty(pre.shape[0], pre.shape[2], dtype=torch.float32)]
