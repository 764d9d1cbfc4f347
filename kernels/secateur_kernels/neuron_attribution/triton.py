"""neuron_attribution in Triton: a matrix product whose result is multiplied and summed in registers."""

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
    store_sums,
    sum_of_parts,
    tile_grid,
    tile_of,
    tile_options,
    tokens_of,
    tuned,
)


@tuned(*TILES, key=["size", "width", "neurons", "weight_neuron", "PRECISION", "REDUCTION"])
@triton.jit
def neuron_attribution_kernel(
    h,
    g,
    weight,
    mask,
    out,
    rows,
    tokens,
    width,
    neurons,
    tiles,
    size,
    h_row,
    g_row,
    weight_width,
    weight_neuron,
    NEURONS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    REDUCTION: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Compute one tile's part of the sums that `neuron_attribution` returns.

    out[b, tile, f] = sum over the tile's tokens t of mask[b, t] * r(h[b, t, f] * sum over d of g[b, t, d] * weight[d, f])

    h: [rows, F]. g: [rows, D]. weight: [D, F]. mask: [rows], or None. out: [B, tiles, F] in float32. rows = B * T. size: for
    the tuning's key. Source: Yang et al. 2023, arXiv 2205.04157, Eq. 4-5.
    """
    tile, neuron_tile = tile_of(tl.program_id(0), rows, neurons, NEURONS, TOKENS, GROUP)
    neuron = neuron_tile.to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    dh = gradient_tile(
        *(g, weight, tokens_of(tile, -1, TOKENS), neuron, rows, width, neurons, g_row, weight_width, weight_neuron),
        *(NEURONS, TOKENS, DEPTH, PRECISION, WIDEN),
    )
    first, second, third, fourth = quarters(dh)
    first = _scores(first, h, mask, tokens_of(tile, 0, TOKENS), neuron, rows, neurons, h_row, REDUCTION)
    second = _scores(second, h, mask, tokens_of(tile, 1, TOKENS), neuron, rows, neurons, h_row, REDUCTION)
    third = _scores(third, h, mask, tokens_of(tile, 2, TOKENS), neuron, rows, neurons, h_row, REDUCTION)
    fourth = _scores(fourth, h, mask, tokens_of(tile, 3, TOKENS), neuron, rows, neurons, h_row, REDUCTION)
    if SHORT:  # Many examples in a tile: each adds up only the quarters that it meets.
        total = tl.zeros([NEURONS, TOKENS // 4], tl.float32)
        b = tile * TOKENS // tokens
        total, b = store_ended(out, first, total, b, tile, neuron, rows, tokens, neurons, tiles, 0, TOKENS)
        total, b = store_ended(out, second, total, b, tile, neuron, rows, tokens, neurons, tiles, 1, TOKENS)
        total, b = store_ended(out, third, total, b, tile, neuron, rows, tokens, neurons, tiles, 2, TOKENS)
        total, b = store_ended(out, fourth, total, b, tile, neuron, rows, tokens, neurons, tiles, 3, TOKENS)
    else:
        store_sums(out, first, second, third, fourth, tile, neuron, rows, tokens, neurons, tiles, TOKENS)


@triton.jit
def _scores(dh, h, mask, row, neuron, rows, neurons, h_row, REDUCTION: tl.constexpr):
    """Return mask * r(h * dh) for one quarter of a tile. dh: [NEURONS, tokens]. row: [tokens]. neuron: [NEURONS]."""
    inside = (neuron < neurons)[:, None] & (row < rows)[None, :]
    scores = dh * tl.load(h + neuron[:, None] + row[None, :] * h_row, mask=inside, other=0.0).to(tl.float32)
    return reduced(scores, mask, row, rows, REDUCTION)


def launch(h: Tensor, g: Tensor, weight: Tensor, mask: Tensor | None, reduction: str, allow_tf32: bool | None) -> Tensor:
    """Run the kernel on h [B, T, F], g [B, T, D] and weight [D, F], and return the scores [B, F] in float32."""
    tokens, width, neurons = g.shape[1], *weight.shape
    options = tile_options(weight, allow_tf32)
    if not h.numel():
        return h.new_zeros(h.shape[0], neurons, dtype=torch.float32)
    partial = partial_sums(g, neurons, options)
    h, g = rows(h), rows(g)
    mask = mask if mask is None else mask.reshape(-1)
    with torch.cuda.device_of(h):
        neuron_attribution_kernel[tile_grid(len(h), neurons, options)](
            *(h, g, weight, mask, partial, len(h), tokens, width, neurons, partial.shape[1], size_class(len(g))),
            *(h.stride(0), g.stride(0), *weight.stride()),
            REDUCTION=reduction,
            SHORT=tokens <= options["TOKENS"] // 4,
            **options,
        )
    return sum_of_parts(partial)
