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
    reduced,
    rows,
    size_class,
    store_ended,
    sum_of_parts,
    tile_grid,
    tile_of,
    tile_options,
    tokens_of,
    tuned,
)


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr):
    """Return act(x) and act'(x) for x in float32.

    gelu_new uses the logistic function: (1 + tanh(z)) / 2 is the logistic function of 2 z. gelu uses Abramowitz and Stegun
    1964, 7.1.26 for the error function, because its exponential is the slope's too; the absolute error is at most 1.5e-7.
    Products and sums are fused by name, so all layouts round alike. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
    """
    if ACTIVATION == "relu":
        value, slope = tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = tl.exp2(x * x * -0.7213475204444817)  # exp(-x^2 / 2)
        t = _inverse(tl.fma(tl.abs(x), 0.23164189, 1.0))
        tail = tl.fma(t, 0.5307027145, -0.7265760135)
        tail = tl.fma(t, tl.fma(t, tl.fma(t, tail, 0.7107068705), -0.142248368), 0.127414796) * t * density
        below = tl.where(x < 0, tail, 1.0 - tail)
        value, slope = x * below, tl.fma(x * 0.3989422804014327, density, below)
    elif ACTIVATION == "gelu_new":
        square = x * x
        below = _inverse(1.0 + tl.exp2(x * tl.fma(square, -0.1029432396, -2.302208198)))
        value = x * below
        slope = tl.fma(tl.fma(-value, below, value), tl.fma(square, 0.2140644488, 1.5957691216), below)
    else:
        below = _inverse(1.0 + tl.exp2(x * -1.4426950408889634))
        value = x * below
        slope = tl.fma(value, 1.0 - below, below)
    return value, slope


@triton.jit
def _inverse(y):
    """Return 1 / y for y >= 1. The square of the inverse root is as exact as Triton's division, and two instructions."""
    root = tl.rsqrt(y)
    return root * root


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
    neuron = neuron_tile.to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    dh = gradient_tile(
        *(g, weight, tokens_of(tile, -1, TOKENS), neuron, rows, width, neurons, g_row, weight_width, weight_neuron),
        *(NEURONS, TOKENS, DEPTH, PRECISION, WIDEN),
    )
    parts = quarters(dh)
    total = tl.zeros([NEURONS, TOKENS // 4], tl.float32)
    b = tile * TOKENS // tokens
    for part in tl.static_range(4):
        scores = part_of_tile(
            *(parts[part], pre, up, mask, dpre, dup, tokens_of(tile, part, TOKENS), neuron, rows, neurons, pre_row, up_row),
            *(ACTIVATION, REDUCTION),
        )
        total, b = store_ended(out, scores, total, b, tile, neuron, rows, tokens, neurons, tiles, part, TOKENS)


@triton.jit
def part_of_tile(
    dh,
    pre,
    up,
    mask,
    dpre,
    dup,
    row,
    neuron,
    rows,
    neurons,
    pre_row,
    up_row,
    ACTIVATION: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Store the gradients of some tokens, and return their scores [NEURONS, tokens].

    dh: [NEURONS, tokens]. row: [tokens], the tokens' rows, of which those below `rows` count. neuron: [NEURONS].
    """
    inside = (neuron < neurons)[:, None] & (row < rows)[None, :]
    at = neuron[:, None] + row[None, :] * neurons
    x = tl.load(pre + neuron[:, None] + row[None, :] * pre_row, mask=inside, other=0.0).to(tl.float32)
    value, slope = value_and_slope(x, ACTIVATION)
    scores = dh * value
    if up is None:
        tl.store(dpre + at, dh * slope, mask=inside)
    else:
        tl.store(dup + at, scores, mask=inside)
        gate = tl.load(up + neuron[:, None] + row[None, :] * up_row, mask=inside, other=0.0).to(tl.float32)
        tl.store(dpre + at, dh * gate * slope, mask=inside)
        scores *= gate
    return reduced(scores, mask, row, rows, REDUCTION)


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
