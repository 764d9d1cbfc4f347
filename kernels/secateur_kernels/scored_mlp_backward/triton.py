"""scored_mlp_backward in Triton: the matrix product of neuron_attribution.

The activation's gradient is computed in the same registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur_kernels.tiles import (
    TILES,
    gradient_tile,
    partial_sums,
    quarters,
    rows,
    size_class,
    store_sums,
    sum_of_parts,
    tile_grid,
    tile_of,
    tile_options,
    tuned,
)


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr):
    """Return act(x) and act'(x) for x in float32.

    gelu_new uses the logistic function: (1 + tanh(z)) / 2 is the logistic function of 2 z. Source: Hendrycks and Gimpel 2016,
    arXiv 1606.08415.
    """
    if ACTIVATION == "relu":
        value, slope = tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value, slope = x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_new":
        square = x * x
        below = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        value, slope = x * below, below + x * below * (1.0 - below) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        below = tl.sigmoid(x)
        value, slope = x * below, below + x * below * (1.0 - below)
    return value, slope


@tuned(*TILES, key=["size", "width", "neurons", "weight_neuron", "PRECISION", "ACTIVATION", "REDUCTION"])
@triton.jit
def scored_mlp_backward_kernel(
    g,
    weight,
    pre,
    up,
    mask,
    dpre,
    dup,
    out,
    rows,
    tokens,
    width,
    neurons,
    tiles,
    size,
    g_row,
    weight_width,
    weight_neuron,
    pre_row,
    up_row,
    NEURONS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Compute one tile of the gradients, and the tile's part of the scores.

    dh = g @ weight, dpre = dh * act'(pre) [* up], dup = dh * act(pre)
    out[b, tile, f] = sum over the tile's tokens t of mask[b, t] * r(dh * act(pre) [* up])

    g: [rows, D]. weight: [D, F]. pre, up, dpre, dup: [rows, F]; up is None for a plain MLP. mask: [rows], or None. out: [B,
    tiles, F] in float32. rows = B * T. size: for the tuning's key. Source: the formulas of `scored_mlp_backward`; gated MLPs:
    Shazeer 2020, arXiv 2002.05202.
    """
    tile, neuron_tile = tile_of(tl.program_id(0), rows, neurons, NEURONS, TOKENS, GROUP)
    row = tile * TOKENS + tl.arange(0, TOKENS)
    neuron = neuron_tile * NEURONS + tl.arange(0, NEURONS)
    dh = gradient_tile(
        *(g, weight, row, neuron, rows, width, neurons, g_row, weight_width, weight_neuron),
        *(NEURONS, TOKENS, DEPTH, PRECISION, WIDEN),
    )
    parts = quarters(dh)
    carry = tl.zeros([NEURONS], tl.float32)
    for part in tl.static_range(4):
        row = tile * TOKENS + part * (TOKENS // 4) + tl.arange(0, TOKENS // 4)
        inside = (neuron < neurons)[:, None] & (row < rows)[None, :]
        at = neuron[:, None] + row[None, :] * neurons
        x = tl.load(pre + neuron[:, None] + row[None, :] * pre_row, mask=inside, other=0.0).to(tl.float32)
        value, slope = value_and_slope(x, ACTIVATION)
        scores = parts[part] * value
        if up is None:
            tl.store(dpre + at, parts[part] * slope, mask=inside)
        else:
            tl.store(dup + at, scores, mask=inside)
            gate = tl.load(up + neuron[:, None] + row[None, :] * up_row, mask=inside, other=0.0).to(tl.float32)
            tl.store(dpre + at, parts[part] * gate * slope, mask=inside)
            scores *= gate
        carry = store_sums(
            *(scores, carry, mask, out, tile, neuron, rows, tokens, neurons, tiles),
            *(part, TOKENS, REDUCTION),
        )


def launch(
    g: Tensor,
    weight: Tensor,
    pre: Tensor,
    up: Tensor | None,
    mask: Tensor | None,
    activation: str,
    reduction: str,
    allow_tf32: bool | None,
) -> list[Tensor]:
    """Run the kernel. Return dpre [B, T, F], dup [B, T, F] in a gated MLP, and the scores [B, F] in float32."""
    tokens, width, neurons = g.shape[1], *weight.shape
    options = tile_options(weight, allow_tf32)
    gradients = [torch.empty(pre.shape, dtype=pre.dtype, device=pre.device) for _ in range(1 if up is None else 2)]
    if not pre.numel():
        return [*gradients, pre.new_zeros(pre.shape[0], neurons, dtype=torch.float32)]
    partial = partial_sums(g, neurons, options)
    g, pre = rows(g), rows(pre)
    up = up if up is None else rows(up)
    mask = mask if mask is None else mask.reshape(-1)
    with torch.cuda.device_of(g):
        scored_mlp_backward_kernel[tile_grid(len(g), neurons, options)](
            *(g, weight, pre, up, mask, gradients[0], gradients[-1], partial),
            *(len(g), tokens, width, neurons, partial.shape[1], size_class(len(g))),
            *(g.stride(0), *weight.stride(), pre.stride(0), 0 if up is None else up.stride(0)),
            ACTIVATION=activation,
            REDUCTION=reduction,
            **options,
        )
    return [*gradients, sum_of_parts(partial)]
