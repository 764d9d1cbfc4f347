"""What the Triton kernels share: tuning, a tile of a gradient, sums over each example. Imported with a kernel, never before."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur_kernels.backend import INTERPRETED

FIXED = INTERPRETED or os.environ.get("SECATEUR_AUTOTUNE") == "0"
# A product and a sum fused here and not there, as layouts have it, would round differently.
OPTIONS = {"enable_fp_fusion": False}


def tuned(*candidates: dict[str, int], key: list[str]) -> Callable[[Any], Any]:
    """Times a kernel's candidates once for each dtype and value of `key`, and keeps the outcome on disk.

    A candidate may set only what leaves the order of additions alone, so that whichever is faster never changes a bit of a
    result; what sets that order is a function of shapes and dtype, given at the launch. SECATEUR_AUTOTUNE=0: the first
    candidate, untimed.
    """
    configs = []
    for candidate in candidates[:1] if FIXED else candidates:
        constants = {name: value for name, value in candidate.items() if name.isupper()}
        limits = {name: candidate.get(name) for name in ("num_warps", "num_stages")}
        configs.append(triton.Config(constants, **limits))
    decorator: Callable[[Any], Any] = triton.autotune(configs, key=key, cache_results=True)
    return decorator


def rows(tensor: Tensor) -> Tensor:
    """[B, T, C] as [B * T, C] with stride 1 along C: a view where the strides allow one, else a copy."""
    flat = tensor.flatten(0, 1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


# Of a tile of [neurons, tokens] = weight.T @ g.T, and of its loop over the model's width. Tokens lie along the second axis,
# which the accumulators of tensor cores keep within a thread and three of its neighbours: their sums cost next to nothing.
# With few steps of the loop two programs share a multiprocessor, and one loads while the other multiplies; with many, the
# large tile reads less.
HALF = {"NEURONS": 128, "TOKENS": 128, "DEPTH": 64, "num_warps": 8}
WIDE = {"NEURONS": 256, "TOKENS": 128, "DEPTH": 64, "num_warps": 8}
TF32 = {"NEURONS": 128, "TOKENS": 128, "DEPTH": 32, "num_warps": 8}
SINGLE = {"NEURONS": 64, "TOKENS": 64, "DEPTH": 32, "num_warps": 4}
# Programs that run together share columns of the weight: GROUP tiles of tokens for each tile of neurons.
TILES = ({"GROUP": 8, "num_stages": 3}, {"GROUP": 8, "num_stages": 4}, {"GROUP": 16, "num_stages": 3})


def tile_options(weight: Tensor, allow_tf32: bool) -> dict[str, Any]:
    width, neurons = weight.shape
    if weight.dtype == torch.float32:
        options = TF32 if allow_tf32 else SINGLE
    else:
        options = WIDE if width >= 1024 and width % 16 == 0 and neurons % 16 == 0 else HALF
    # Triton's interpreter multiplies the bits of bfloat16 operands as if they were integers (seen in 3.6 and 3.9).
    widen = INTERPRETED and weight.dtype == torch.bfloat16
    return {**options, **OPTIONS, "PRECISION": "tf32" if allow_tf32 else "ieee", "WIDEN": widen}


def tile_grid(tokens: int, neurons: int, options: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(tokens, options["TOKENS"]) * triton.cdiv(neurons, options["NEURONS"]),)


def partial_sums(g: Tensor, neurons: int, options: dict[str, Any]) -> Tensor:
    """Zeros [B, tiles, F]: a place for what each tile of tokens adds to each example that it meets."""
    batch, tokens, _ = g.shape
    tiles = min((tokens - 1) // options["TOKENS"] + 2, triton.cdiv(batch * tokens, options["TOKENS"]))
    return torch.zeros(batch, tiles, neurons, dtype=torch.float32, device=g.device)


@triton.jit
def tile_of(program, rows, neurons, NEURONS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr):
    """A program's tile of tokens and tile of neurons, as int64."""
    program = program.to(tl.int64)
    token_tiles = tl.cdiv(rows, TOKENS)
    neuron_tiles = tl.cdiv(neurons, NEURONS)
    group = program // (GROUP * neuron_tiles)
    first = group * GROUP
    size = tl.minimum(GROUP, token_tiles - first)
    within = program % (GROUP * neuron_tiles)
    return first + within % size, within // size


@triton.jit
def gradient_tile(
    g,
    weight,
    row,
    neuron,
    rows,
    width,
    neurons,
    g_row,
    weight_width,
    weight_neuron,
    NEURONS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """(g @ weight).T for the given rows of g and columns of weight: [NEURONS, TOKENS] in float32."""
    depth = tl.arange(0, DEPTH)
    weight_at = weight + neuron[:, None] * weight_neuron + depth[None, :] * weight_width
    g_at = g + depth[:, None] + row[None, :] * g_row
    total = tl.zeros([NEURONS, TOKENS], tl.float32)
    for start in range(0, width, DEPTH):
        inside = depth < width - start
        weight_tile = tl.load(weight_at, mask=(neuron < neurons)[:, None] & inside[None, :], other=0.0)
        g_tile = tl.load(g_at, mask=inside[:, None] & (row < rows)[None, :], other=0.0)
        if WIDEN:
            weight_tile, g_tile = weight_tile.to(tl.float32), g_tile.to(tl.float32)
        total = tl.dot(weight_tile, g_tile, total, input_precision=PRECISION)
        weight_at += DEPTH * weight_width
        g_at += DEPTH
    return total


@triton.jit
def quarters(tile):
    """[M, N] as four tensors [M, N // 4], in order: what follows a product needs registers for a quarter of it at a time."""
    first, second = _halves(tile)
    a, b = _halves(first)
    c, d = _halves(second)
    return a, b, c, d


@triton.jit
def _halves(tile):
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def store_sums(
    scores,
    carry,
    mask,
    out,
    tile,
    neuron,
    rows,
    tokens,
    neurons,
    tiles,
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """out[b, tile, f] = sum over the tile's tokens of b of mask * r(score), for each example b that ends in this part of it.

    scores: [NEURONS, TOKENS // 4], the part's. carry: the sum so far for the example that the part before ended in.
    mask: [rows], or None. Returns the next carry.
    """
    QUARTER: tl.constexpr = TOKENS // 4
    start = tile * TOKENS + PART * QUARTER
    end = tl.minimum(start + QUARTER, rows)
    stop = start + QUARTER
    if PART == 3:
        stop = tl.maximum(start, rows)
    position = tl.arange(0, QUARTER)
    if REDUCTION == "abs_sum":
        scores = tl.abs(scores)
    elif REDUCTION == "square_sum":
        scores *= scores
    if mask is not None:
        scores *= tl.load(mask + start + position, mask=position < end - start, other=0).to(tl.float32)[None, :]
    for b in tl.range(start // tokens, (end - 1) // tokens + 1):
        here = (position >= b * tokens - start) & (position < (b + 1) * tokens - start)
        carry += tl.sum(tl.where(here[None, :], scores, 0.0), 1)
        ends = (b + 1) * tokens <= stop
        place = tile - b * tokens // TOKENS
        tl.store(out + (b * tiles + place) * neurons + neuron, carry, mask=neuron < tl.where(ends, neurons, 0))
        carry = tl.where(ends, 0.0, carry)
    return carry
