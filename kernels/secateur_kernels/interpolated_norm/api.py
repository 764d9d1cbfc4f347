"""The public function interpolated_norm, which checks its arguments and chooses a backend, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur_kernels.backend import (
    Backend,
    Norm,
    check_alike,
    check_device,
    check_dimensions,
    check_one_of,
    check_shape,
    uses_triton,
)
from secateur_kernels.interpolated_norm.reference import interpolated_norm_reference


def interpolated_norm(
    r: Tensor,
    u: Tensor,
    bias: Tensor | None,
    nodes: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    kind: Norm,
    *,
    zeros: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the points of a path between two residual streams, and the norm of each point.

        residuals[k] = r + nodes[k] * u + bias
        normed[k]    = norm(residuals[k])

    "rms_norm" is x / sqrt(mean(x^2) + eps) * norm_weight + norm_bias. "layer_norm" is the same function of x - mean(x). Means
    are over D. The norm uses the residual before it is rounded to r's dtype.

    G[k] is the gradient at residuals[k] from both outputs. The gradient at r is the sum over k of G[k]. The gradient at u is
    the sum over k of nodes[k] * G[k]. The gradient at bias is the sum of G[k] over k and all tokens. With Triton, G is written
    only as the gradient of `zeros`.

    Args:
        r: The start of the path [B, T, D], a floating dtype, any strides.
        u: The direction of the path [B, T, D], in the dtype of r, any strides.
        bias: A vector [D] that is added to all residuals, any floating dtype, or None.
        nodes: The positions on the path [K], or [K, B] if they differ between examples, any floating dtype.
        norm_weight: The norm's scale [D], any floating dtype, or None.
        norm_bias: The norm's shift [D], any floating dtype, or None.
        eps: The constant under the square root.
        kind: "rms_norm" or "layer_norm".
        zeros: A tensor [K, B, T, D] in the dtype of r whose gradient is G, or None. It stands for zeros that are added to the
            residuals. Triton does not read it, so it may be one number, expanded.
        backend: The implementation, see `secateur_kernels.backend.uses_triton`.

    Returns:
        The residuals and their norms, both [K, B, T, D] in r's dtype. They are computed in float32 (float64 for float64
        inputs). Triton copies r and u if D has gaps or B and T cannot be merged.

    Raises:
        ValueError: Shapes, dtypes or devices do not agree, the backend cannot run, or nodes, norm_weight or norm_bias require a
            gradient with Triton, which has none for them.

    Reference:
        RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467. LayerNorm: Ba et al. 2016, arXiv 1607.06450.
    """
    check_dimensions("r", r, "B, T, D")
    check_shape("u", u, *r.shape)
    check_alike(r=r, u=u)
    if nodes.dim() != 1 and (nodes.dim() != 2 or nodes.shape[1] != r.shape[0]):
        raise ValueError(f"nodes: expected shape [K] or [K, {r.shape[0]}], got {tuple(nodes.shape)}")
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, vector in vectors.items():
        check_shape(name, vector, r.shape[2])
    for name, tensor in {"nodes": nodes, **vectors}.items():
        if tensor is not None:
            check_alike(**{name: tensor})
    check_shape("zeros", zeros, len(nodes), *r.shape)
    check_device(r=r, nodes=nodes, zeros=zeros, **vectors)
    check_one_of("kind", kind, Norm)
    if not uses_triton(backend, r):
        return interpolated_norm_reference(r, u, bias, nodes, norm_weight, norm_bias, eps, kind, zeros)
    for name, tensor in (("nodes", nodes), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected requires_grad=False with Triton (use backend='reference'), got True")
    residuals, normed, _ = _interpolated_norm(r, u, bias, nodes, norm_weight, norm_bias, eps, kind, zeros)
    return residuals, normed


@torch.library.custom_op("secateur::interpolated_norm", mutates_args=())
def _interpolated_norm(
    r: Tensor,
    u: Tensor,
    bias: Tensor | None,
    nodes: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    kind: str,
    zeros: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the Triton kernel as one operator.

    It returns the residuals, their norms, and the norms' statistics [2, K, B, T] in float32: the subtracted mean, and the
    factor before norm_weight.
    """
    from secateur_kernels.interpolated_norm.triton import launch

    return launch(r, u, bias, nodes, norm_weight, norm_bias, eps, kind)


@_interpolated_norm.register_fake
def _(r: Tensor, u: Tensor, bias: Tensor | None, nodes: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (nodes.shape[0], *r.shape)
    return r.new_empty(shape), r.new_empty(shape), r.new_empty(2, *shape[:3], dtype=torch.float32)


@torch.library.custom_op("secateur::interpolated_norm_backward", mutates_args=())
def _interpolated_norm_backward(
    dresiduals: Tensor | None,
    dnormed: Tensor | None,
    r: Tensor,
    u: Tensor,
    bias: Tensor | None,
    nodes: Tensor,
    norm_weight: Tensor | None,
    statistics: Tensor,
    kind: str,
    needs_dr: bool,
    needs_du: bool,
    needs_dzeros: bool,
    unrounded: bool,
) -> list[Tensor]:
    """Return the gradients at r, u and zeros that are needed. With `unrounded`, the gradient at r is in float32."""
    from secateur_kernels.interpolated_norm.triton import launch_backward

    needed = needs_dr, needs_du, needs_dzeros
    return launch_backward(dresiduals, dnormed, r, u, bias, nodes, norm_weight, statistics, kind, *needed, unrounded)


@_interpolated_norm_backward.register_fake
def _(
    dresiduals: Tensor | None,
    dnormed: Tensor | None,
    r: Tensor,
    u: Tensor,
    bias: Tensor | None,
    nodes: Tensor,
    norm_weight: Tensor | None,
    statistics: Tensor,
    kind: str,
    needs_dr: bool,
    needs_du: bool,
    needs_dzeros: bool,
    unrounded: bool,
) -> list[Tensor]:
    dtypes = [torch.float32 if unrounded else r.dtype] if needs_dr else []
    gradients = [r.new_empty(r.shape, dtype=dtype) for dtype in [*dtypes, *([r.dtype] if needs_du else [])]]
    return [*gradients, *([r.new_empty(nodes.shape[0], *r.shape)] if needs_dzeros else [])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the tensors for the backward pass."""
    r, u, bias, nodes, norm_weight, _, _, ctx.kind, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(r, u, bias, nodes, norm_weight, output[2])


def _backward(ctx: Any, dresiduals: Tensor | None, dnormed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    """Return the gradients at r, u, bias and zeros."""
    r, u, bias, nodes, norm_weight, statistics = ctx.saved_tensors
    needs_dr, needs_du, needs_dbias, *_, needs_dzeros = ctx.needs_input_grad
    gradients = _interpolated_norm_backward(
        *(dresiduals, dnormed, r, u, bias, nodes, norm_weight, statistics),
        *(ctx.kind, needs_dr or needs_dbias, needs_du, needs_dzeros, needs_dbias),
    )
    dr = gradients[0].to(r.dtype) if needs_dr else None
    du = gradients[needs_dr or needs_dbias] if needs_du else None
    dzeros = gradients[-1] if needs_dzeros else None
    dbias = gradients[0].sum((0, 1)).to(bias.dtype) if needs_dbias else None
    return dr, du, dbias, None, None, None, None, None, dzeros


_interpolated_norm.register_autograd(_backward, setup_context=_setup_context)
