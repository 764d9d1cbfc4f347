"""interpolated_norm in Triton. A program holds r and u of one token in registers and loops over the nodes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur_kernels.tiles import OPTIONS, rows, size_class, tuned


@triton.jit
def interpolated_norm_kernel(
    r,
    u,
    bias,
    nodes,
    norm_weight,
    norm_bias,
    residuals,
    normed,
    means,
    inverses,
    eps,
    count,
    rows,
    tokens,
    width,
    r_row,
    u_row,
    nodes_node,
    nodes_batch,
    WIDTH: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Compute the residuals and norms of one token at all nodes.

    x = r + node * u + bias, inverse = 1 / sqrt(mean((x - mean)^2) + eps), normed = (x - mean) * inverse * norm_weight +
    norm_bias

    The mean is zero for RMSNorm. r, u: [rows, D]. nodes: [K] or [K, B]. residuals, normed: [K, rows, D]. means, inverses: [K,
    rows]. rows = B * T. Sources: Zhang and Sennrich 2019, arXiv 1910.07467 (RMSNorm); Ba et al. 2016, arXiv 1607.06450
    (LayerNorm).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    start = tl.load(r + row * r_row + column, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(u + row * u_row + column, mask=inside, other=0.0).to(tl.float32)
    start = _plus(start, bias, column, inside)
    scale = tl.full([WIDTH], 1.0, tl.float32)
    if norm_weight is not None:
        scale = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    node_at = nodes + row // tokens * nodes_batch
    node_row = row
    for _ in range(count):
        node = tl.load(node_at).to(tl.float32)
        x = start + node * step
        offset = node_row * width + column
        tl.store(residuals + offset, x, mask=inside)
        if CENTRED:
            mean = tl.sum(x, 0) / width
            x = tl.where(inside, x - mean, 0.0)
            tl.store(means + node_row, mean)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)
        tl.store(inverses + node_row, inverse)
        tl.store(normed + offset, _plus(x * inverse * scale, norm_bias, column, inside), mask=inside)
        node_row += rows
        node_at += nodes_node


@tuned({"STAGES": 2}, {"STAGES": 1}, {"STAGES": 3}, key=["size", "count", "width", "CENTRED"])
@triton.jit
def interpolated_norm_backward_kernel(
    dresiduals,
    dnormed,
    r,
    u,
    bias,
    nodes,
    norm_weight,
    means,
    inverses,
    dr,
    du,
    dzeros,
    size,
    count,
    rows,
    tokens,
    width,
    r_row,
    u_row,
    nodes_node,
    nodes_batch,
    WIDTH: tl.constexpr,
    CENTRED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the gradients at r, u and zeros of one token.

    dr = sum over k of G[k], du = sum over k of nodes[k] * G[k], dzeros[k] = G[k]. G[k] is the gradient at residuals[k]. With x
    the residual, y = (x - mean) * inverse and d = dnormed * norm_weight, G = dresiduals + inverse * (d - y * mean(d * y)).
    LayerNorm also subtracts inverse * mean(d).

    An output that is None is not needed. A gradient that is None is zero. size: for the tuning's key. dresiduals, dnormed,
    dzeros: [K, rows, D]. r, u, dr, du: [rows, D]. means, inverses: [K, rows]. Sources: the derivatives of RMSNorm (arXiv
    1910.07467) and LayerNorm (arXiv 1607.06450).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    start = tl.load(r + row * r_row + column, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(u + row * u_row + column, mask=inside, other=0.0).to(tl.float32)
    start = _plus(start, bias, column, inside)
    scale = tl.full([WIDTH], 1.0, tl.float32)
    if norm_weight is not None:
        scale = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    node_at = nodes + row // tokens * nodes_batch
    total = tl.zeros([WIDTH], tl.float32)
    weighted = tl.zeros([WIDTH], tl.float32)
    node_row = row
    for _ in tl.range(0, count, num_stages=STAGES):
        d = tl.zeros([WIDTH], tl.float32)
        if dnormed is not None:
            d = tl.load(dnormed + node_row * width + column, mask=inside, other=0.0).to(tl.float32) * scale
        node = tl.load(node_at).to(tl.float32)
        inverse = tl.load(inverses + node_row)
        x = start + node * step
        if CENTRED:
            x = tl.where(inside, x - tl.load(means + node_row), 0.0)
            d -= tl.where(inside, tl.sum(d, 0) / width, 0.0)
        y = x * inverse
        gradient = inverse * (d - y * (tl.sum(d * y, 0) / width))
        if dresiduals is not None:
            gradient += tl.load(dresiduals + node_row * width + column, mask=inside, other=0.0).to(tl.float32)
        if dzeros is not None:
            tl.store(dzeros + node_row * width + column, gradient, mask=inside)
        total += gradient
        weighted += node * gradient
        node_row += rows
        node_at += nodes_node
    if dr is not None:
        tl.store(dr + row * width + column, total, mask=inside)
    if du is not None:
        tl.store(du + row * width + column, weighted, mask=inside)


@triton.jit
def _plus(x, vector, column, inside):
    """Return x plus a vector, or x if the vector is None."""
    if vector is not None:
        x += tl.load(vector + column, mask=inside, other=0.0).to(tl.float32)
    return x


def launch(
    r: Tensor,
    u: Tensor,
    bias: Tensor | None,
    nodes: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel. Return residuals and norms [K, B, T, D], and statistics [2, K, B, T] in float32."""
    residuals, normed = (torch.empty(len(nodes), *r.shape, dtype=r.dtype, device=r.device) for _ in range(2))
    # Zeros, because RMSNorm subtracts no mean.
    statistics = torch.zeros(2, len(nodes), *r.shape[:2], dtype=torch.float32, device=r.device)
    if residuals.numel():
        with torch.cuda.device_of(r):
            interpolated_norm_kernel[(r.shape[0] * r.shape[1],)](
                *(rows(r), rows(u), _packed(bias), nodes, _packed(norm_weight), _packed(norm_bias)),
                *(residuals, normed, *statistics, eps, *_sizes(r, u, nodes)),
                **_options(r, kind),
            )
    return residuals, normed, statistics


def launch_backward(
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
    """Run the backward kernel. Return the gradients at r and u [B, T, D], and at zeros [K, B, T, D], that are needed."""
    dr = torch.empty(r.shape, dtype=torch.float32 if unrounded else r.dtype, device=r.device) if needs_dr else None
    du = torch.empty(r.shape, dtype=r.dtype, device=r.device) if needs_du else None
    dzeros = torch.empty(len(nodes), *r.shape, dtype=r.dtype, device=r.device) if needs_dzeros else None
    if r.numel() and (needs_dr or needs_du or needs_dzeros):
        with torch.cuda.device_of(r):
            interpolated_norm_backward_kernel[(r.shape[0] * r.shape[1],)](
                *(_packed(dresiduals), _packed(dnormed), rows(r), rows(u), _packed(bias), nodes, _packed(norm_weight)),
                *(*statistics, dr, du, dzeros, size_class(r.shape[0] * r.shape[1]), *_sizes(r, u, nodes)),
                **_options(r, kind),
            )
    return [gradient for gradient in (dr, du, dzeros) if gradient is not None]


def _packed(tensor: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor, or None."""
    return tensor if tensor is None else tensor.contiguous()


def _sizes(r: Tensor, u: Tensor, nodes: Tensor) -> tuple[int, ...]:
    """Return the sizes and strides that both kernels take."""
    batch, tokens, width = r.shape
    stride = nodes.stride(1) if nodes.dim() == 2 else 0
    return len(nodes), batch * tokens, tokens, width, rows(r).stride(0), rows(u).stride(0), nodes.stride(0), stride


def _options(r: Tensor, kind: str) -> dict[str, Any]:
    """Return block size and warps, which set the order of a row's sums.

    A thread holds 8 elements of r, 16 bytes in half precision.
    """
    width = max(triton.next_power_of_2(r.shape[2]), 16)
    warps = min(max(width // 256, 1), 16)
    return {"WIDTH": width, "CENTRED": kind == "layer_norm", "num_warps": warps, **OPTIONS}
