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
    rows,
    size_class,
    store_sums,
    sum_of_parts,
    tile_grid,
    tile_of,
    tile_options,
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
):
    """Compute one tile's part of the sums that `neuron_attribution` returns.

    out[b, tile, f] = sum over the tile's tokens t of mask[b, t] * r(h[b, t, f] * sum over d of g[b, t, d] * weight[d, f])

    h: [rows, F]. g: [rows, D]. weight: [D, F]. mask: [rows], or None. out: [B, tiles, F] in float32. rows = B * T. size: for
    the tuning's key. Source: Yang et al. 2023, arXiv 2205.04157, Eq. 4-5.
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
        at = h + neuron[:, None] + row[None, :] * h_row
        scores = parts[part] * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        carry = store_sums(
            *(scores, carry, mask, out, tile, neuron, rows, tokens, neurons, tiles),
            *(part, TOKENS, REDUCTION),
        )


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
            **options,
        )
    return sum_of_parts(partial)
