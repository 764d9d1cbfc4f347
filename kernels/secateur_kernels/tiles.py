"""Shared parts of the Triton kernels: tuning, a tile of a gradient, and sums over the tokens of each example.

A kernel imports this module, so its import needs Triton.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur_kernels.backend import INTERPRETED, Device, device_of, uses_tf32

FIXED = INTERPRETED or os.environ.get("SECATEUR_AUTOTUNE") == "0"
# The compiler would fuse a product and a sum in some layouts and not in others, and the two round differently.
OPTIONS = {"enable_fp_fusion": False}


def tuned(*candidates: dict[str, int], key: list[str]) -> Callable[[Any], Any]:
    """Return a decorator that times a kernel's candidate settings and keeps the fastest.

    The candidates are timed once for each dtype and each value of `key`. The result is kept in Triton's cache on disk. A
    candidate may only set values that do not change the order of additions, so the choice never changes a bit of a result.
    Values that set this order are functions of shapes and dtype, and the launch passes them. With SECATEUR_AUTOTUNE=0, and
    under Triton's interpreter, the kernel uses the first candidate and times nothing.

    Args:
        candidates: Settings by name. Upper-case names are the kernel's constants. `num_warps` and `num_stages` are Triton's.
        key: The kernel arguments that a choice depends on.

    Returns:
        The decorator.
    """
    configs = []
    for candidate in candidates[:1] if FIXED else candidates:
        constants = {name: value for name, value in candidate.items() if name.isupper()}
        limits = {name: candidate.get(name) for name in ("num_warps", "num_stages")}
        configs.append(triton.Config(constants, **limits))

    def decorator(kernel: Any) -> Any:
        tuner = triton.autotune(configs, key=key, cache_results=True)(kernel)
        run, lock = tuner.run, threading.Lock()

        def run_alone(*arguments: Any, **options: Any) -> Any:
            with lock:  # Triton's tuner keeps a launch's arguments on itself, so two threads would mix theirs.
                return run(*arguments, **options)

        tuner.run = run_alone
        return tuner

    return decorator


def size_class(rows: int) -> int:
    """Return a number of rows rounded up to a power of two, at least 16.

    Kernels take it for the key of their tuning alone. So batches of about the same size share a choice.
    """
    return max(16, int(triton.next_power_of_2(rows)))


def rows(tensor: Tensor) -> Tensor:
    """Return a tensor as a matrix with one row per token.

    Args:
        tensor: A tensor [B, T, C].

    Returns:
        The matrix [B * T, C] with stride 1 along C. It is a view where the strides allow one, otherwise a copy.
    """
    flat = tensor.flatten(0, 1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


# Sizes of a tile of [neurons, tokens] = weight.T @ g.T, and of a step of its loop over the model's width. Tokens are the second
# axis. The accumulators of tensor cores keep this axis within a thread and three of its neighbours, so sums over tokens cost
# almost nothing. If the loop has few steps, two programs share a multiprocessor, and one loads while the other multiplies. If
# the loop has many steps, the large tile is better, because it reads less.
HALF = {"NEURONS": 128, "TOKENS": 128, "DEPTH": 64, "num_warps": 8}
WIDE = {"NEURONS": 256, "TOKENS": 128, "DEPTH": 64, "num_warps": 8}
TF32 = {"NEURONS": 128, "TOKENS": 128, "DEPTH": 32, "num_warps": 8}
SINGLE = {"NEURONS": 64, "TOKENS": 64, "DEPTH": 32, "num_warps": 4}
# Half precision without matrix units: both operands are widened in registers.
WIDENED = {"NEURONS": 64, "TOKENS": 64, "DEPTH": 16, "num_warps": 8}
# Programs that run at the same time share columns of the weight: GROUP tiles of tokens for each tile of neurons.
TILES = ({"GROUP": 8, "num_stages": 3}, {"GROUP": 8, "num_stages": 4}, {"GROUP": 16, "num_stages": 3})


def tile_options(weight: Tensor, allow_tf32: bool | None) -> dict[str, Any]:
    """Return the launch options for a matrix product with this weight.

    Args:
        weight: The out-projection's weight [D, F].
        allow_tf32: Whether float32 products may use tf32, see `uses_tf32`. Devices without tf32 never do.

    Returns:
        The tile's sizes, the warps and the precision. They set the order of additions. They are functions of the weight's shape
        and dtype, the precision and the device.
    """
    device = device_of(weight.device)
    width, neurons = weight.shape
    aligned = width % 16 == 0 and neurons % 16 == 0
    tf32 = weight.dtype == torch.float32 and device.tf32 and uses_tf32(allow_tf32)
    if weight.dtype == torch.float32:
        tiles = [TF32, SINGLE] if tf32 else [SINGLE]
    elif device.products:
        tiles = [WIDE, HALF] if width >= 1024 and aligned else [HALF]
    else:
        tiles = [WIDENED]
    fitting = [tile for tile in tiles if _shared(tile, weight.element_size(), device) <= device.shared]
    tile = (fitting or tiles[-1:])[0]
    options: dict[str, Any] = {**tile, **OPTIONS, "PRECISION": "tf32" if tf32 else "ieee"}
    if tile is HALF and aligned and device.asynchronous:
        # Two programs of 256 threads share a multiprocessor. On other devices, and for other widths, this spills.
        options["maxnreg"] = 128
    # Triton's interpreter multiplies the bits of bfloat16 operands as integers (seen in 3.6 and 3.9).
    widen = INTERPRETED and weight.dtype == torch.bfloat16
    return {**options, "WIDEN": widen}


def _shared(tile: dict[str, int], element: int, device: Device) -> int:
    """Return the bytes of shared memory that the loop over a tile needs with three stages (counted on compiled kernels).

    Matrix units that read shared memory while they multiply need a buffer for the third stage.
    """
    return (3 if device.asynchronous else 2) * (tile["NEURONS"] + tile["TOKENS"]) * tile["DEPTH"] * element


def tile_grid(tokens: int, neurons: int, options: dict[str, Any]) -> tuple[int]:
    """Return the launch grid: one program for each tile of tokens and each tile of neurons.

    Args:
        tokens: The rows of all examples, B * T.
        neurons: The columns of the weight, F.
        options: The result of `tile_options`.
    """
    return (triton.cdiv(tokens, options["TOKENS"]) * triton.cdiv(neurons, options["NEURONS"]),)


def partial_sums(g: Tensor, neurons: int, options: dict[str, Any]) -> Tensor:
    """Return memory for the partial sums that `store_sums` writes.

    An example starts at a multiple of gcd(T, TOKENS) within its first tile. This bounds the tiles that it can meet.

    Args:
        g: The gradient at the out-projection's output [B, T, D], T > 0.
        neurons: The columns of the weight, F.
        options: The result of `tile_options`.

    Returns:
        A tensor [B, tiles, F] in float32: one place for each example and each tile of tokens that it can meet. It holds zeros
        if some example may meet fewer tiles. Otherwise it is not initialised, because every place is written.
    """
    batch, tokens, _ = g.shape
    size = options["TOKENS"]
    step = math.gcd(tokens, size)
    tiles = min((tokens + size - 1 - step) // size + 1, triton.cdiv(batch * tokens, size))
    all_written = tiles == 1 or step == size
    make = torch.empty if all_written else torch.zeros
    return make(batch, tiles, neurons, dtype=torch.float32, device=g.device)


def sum_of_parts(partial: Tensor) -> Tensor:
    """Return the sums [B, C] of partial sums [B, parts, C]. A single part is not copied."""
    return partial[:, 0] if partial.shape[1] == 1 else partial.sum(1)


@triton.jit
def tile_of(program, rows, neurons, NEURONS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr):
    """Return a program's tile of tokens and its tile of neurons, in int32 if `rows` fits in it.

    Up to GROUP consecutive programs have the same tile of neurons.
    """
    token_tiles = tl.cdiv(rows, TOKENS)
    neuron_tiles = tl.cdiv(neurons, NEURONS)
    group = program // (GROUP * neuron_tiles)
    first = group * GROUP
    size = tl.minimum(GROUP, token_tiles - first)
    within = program % (GROUP * neuron_tiles)
    return first + within % size, within // size


@triton.jit
def tokens_of(tile, PART: tl.constexpr, TOKENS: tl.constexpr):
    """Return the rows of a tile's tokens, as int64: all of them, [TOKENS], or with PART >= 0 one quarter, [TOKENS // 4]."""
    SIZE: tl.constexpr = TOKENS if PART < 0 else TOKENS // 4
    FIRST: tl.constexpr = 0 if PART < 0 else PART * SIZE
    return tile.to(tl.int64) * TOKENS + FIRST + tl.arange(0, SIZE)


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
    """Return (g @ weight).T for some rows of g and some columns of weight, [NEURONS, TOKENS] in float32.

    g: [rows, D] with stride 1 along D. weight: [D, F]. row: [TOKENS], the rows of g. neuron: [NEURONS], the columns of weight.
    rows, width, neurons: the sizes of g and weight. Values outside of them are zero.
    """
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
    """Return a tile [M, N] as four tensors [M, N // 4], in order.

    The code after a product then needs registers for only a quarter of the tile at a time.
    """
    first, second = _halves(tile)
    a, b = _halves(first)
    c, d = _halves(second)
    return a, b, c, d


@triton.jit
def _halves(tile):
    """Return a tile [M, N] as two tensors [M, N // 2], in order."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def reduced(scores, mask, row, rows, REDUCTION: tl.constexpr):
    """Return mask * r(score) for scores [NEURONS, tokens]. row: [tokens], their rows. mask: [rows], or None. REDUCTION: r."""
    if REDUCTION == "abs_sum":
        scores = tl.abs(scores)
    elif REDUCTION == "square_sum":
        scores *= scores
    if mask is not None:
        scores *= tl.load(mask + row, mask=row < rows, other=0).to(tl.float32)[None, :]
    return scores


@triton.jit
def store_sums(out, first, second, third, fourth, tile, neuron, rows, tokens, neurons, tiles, TOKENS: tl.constexpr):
    """Add up the scores of a tile's tokens for each example that the tile meets, and store the sums.

    out[b, slot, f] = sum over the tile's tokens of example b of score

    first, second, third, fourth: [NEURONS, TOKENS // 4], the scores of the tile's quarters. They are added elementwise first,
    so an example takes one sum across threads. out: [B, tiles, F]. slot: the tile, counted from the example's first one.
    """
    QUARTER: tl.constexpr = TOKENS // 4
    start = tile * TOKENS
    last = tl.minimum(start + TOKENS, rows) - 1
    for b in tl.range(start // tokens, last // tokens + 1):
        low = b * tokens - start
        total = _within(first, low, tokens) + _within(second, low - QUARTER, tokens)
        total += _within(third, low - 2 * QUARTER, tokens) + _within(fourth, low - 3 * QUARTER, tokens)
        _store_sum(out, total, b, tile, neuron, tokens, neurons, tiles, TOKENS)


@triton.jit
def store_ended(out, scores, total, b, tile, neuron, rows, tokens, neurons, tiles, PART: tl.constexpr, TOKENS: tl.constexpr):
    """Add the scores of one quarter to the sum of its example, and store the sums that end in this quarter.

    This is `store_sums` for a kernel without registers for the scores of a whole tile.

    scores: [NEURONS, TOKENS // 4]. total: the same shape, the sum so far of example b. PART: the index of the quarter. Returns
    the next quarter's total and its first example.
    """
    QUARTER: tl.constexpr = TOKENS // 4
    start = tile * TOKENS + PART * QUARTER
    meets = b * tokens < tl.minimum(start + QUARTER, rows)
    while meets:
        low = b * tokens - start
        total += _within(scores, low, tokens)
        meets = low + tokens <= QUARTER
        if meets or PART == 3:
            _store_sum(out, total, b, tile, neuron, tokens, neurons, tiles, TOKENS)
            total = tl.zeros_like(total)
        if meets:
            b += 1
            meets = b * tokens < tl.minimum(start + QUARTER, rows)
    return total, b


@triton.jit
def _within(scores, low, tokens):
    """Return scores [NEURONS, positions], with zeros outside of an example that begins at position `low`."""
    position = tl.arange(0, scores.shape[1])
    return tl.where(((position >= low) & (position < low + tokens))[None, :], scores, 0.0)


@triton.jit
def _store_sum(out, total, b, tile, neuron, tokens, neurons, tiles, TOKENS: tl.constexpr):
    """Store the sum of total [NEURONS, positions] over positions as out[b, slot], see `store_sums`."""
    slot = tile - b * tokens // TOKENS
    tl.store(out + (tl.cast(b, tl.int64) * tiles + slot) * neurons + neuron, tl.sum(total, 1), mask=neuron < neurons)
