"""The checked, public form of interpolated_norm, and its gradient."""

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
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """residuals[k] = r + nodes[k] * u + bias, and norm(residuals[k]), both [K, B, T, D] in r's dtype.

    kind: "rms_norm", x / sqrt(mean(x^2) + eps) * norm_weight + norm_bias (Zhang and Sennrich 2019, arXiv 1910.07467), or
    "layer_norm", the same of x - mean(x) (Ba et al. 2016, arXiv 1607.06450); means over D. The norm is that of the residual
    before it is rounded to r's dtype.

    r, u: [B, T, D], one floating dtype; any strides: copied where D has holes or B and T cannot be merged. bias, norm_weight,
    norm_bias: [D] or None. nodes: [K], or [K, B] for nodes of each example's own. These four may have floating dtypes of their
    own. Computed in float32 (float64 for float64 inputs).
    Gradients: with G[k] the gradient at residuals[k], from both outputs, those at r, u and bias are the sum over k of G[k], of
    nodes[k] * G[k], and of G[k] over k and all tokens. With Triton G is never written; nodes, norm_weight and norm_bias have
    no gradient there and must not require one.
    backend: see `secateur_kernels.backend.uses_triton`. Raises ValueError: shapes, dtypes or devices that do not agree.
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
    check_device(r=r, nodes=nodes, **vectors)
    check_one_of("kind", kind, Norm)
    if not uses_triton(backend, r):
        return interpolated_norm_reference(r, u, bias, nodes, norm_weight, norm_bias, eps, kind)
    for name, tensor in (("nodes", nodes), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected requires_grad=False with Triton (use backend='reference'), got True")
    residuals, normed, _ = _interpolated_norm(r, u, bias, nodes, norm_weight, norm_bias, eps, kind)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The residuals, their norms, and [2, K, B, T] in float32: what was subtracted, and what multiplied, before norm_weight."""
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
    unrounded: bool,
) -> list[Tensor]:
    """The gradients at r and u, those of them that are needed; unrounded: that at r in float32."""
    from secateur_kernels.interpolated_norm.triton import launch_backward

    return launch_backward(dresiduals, dnormed, r, u, bias, nodes, norm_weight, statistics, kind, needs_dr, needs_du, unrounded)


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
    unrounded: bool,
) -> list[Tensor]:
    dtypes = [torch.float32 if unrounded else r.dtype] if needs_dr else []
    return [r.new_empty(r.shape, dtype=dtype) for dtype in [*dtypes, *([r.dtype] if needs_du else [])]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    r, u, bias, nodes, norm_weight, _, _, ctx.kind = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(r, u, bias, nodes, norm_weight, output[2])


def _backward(ctx: Any, dresiduals: Tensor | None, dnormed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    r, u, bias, nodes, norm_weight, statistics = ctx.saved_tensors
    needs_dr, needs_du, needs_dbias = ctx.needs_input_grad[:3]
    found = _interpolated_norm_backward(
        *(dresiduals, dnormed, r, u, bias, nodes, norm_weight, statistics),
        *(ctx.kind, needs_dr or needs_dbias, needs_du, needs_dbias),
    )
    dr = found[0].to(r.dtype) if needs_dr else None
    du = found[-1] if needs_du else None
    dbias = found[0].sum((0, 1)).to(bias.dtype) if needs_dbias else None
    return dr, du, dbias, None, None, None, None, None


_interpolated_norm.register_autograd(_backward, setup_context=_setup_context)
