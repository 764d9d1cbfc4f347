"""scored_mlp_backward in two steps: PyTorch's own matrix product, and one kernel for all the rest.

The product is as fast as the vendor's library. It writes dh, which the kernel reads again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur_kernels.scored_mlp_backward.triton import part_of_tile
from secateur_kernels.tiles import OPTIONS, rows, sum_of_parts

# Tokens that one program sums, tokens at once, and neurons. The partial sums are under 2% of the bytes that are read.
CHUNK, STEP, NEURONS = 128, 8, 256


@triton.jit
def activation_backward_kernel(
    dh,
    pre,
    up,
    mask,
    dpre,
    dup,
    out,
    tokens,
    neurons,
    pre_row,
    up_row,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    NEURONS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REDUCTION: tl.constexpr,
):
    """Compute the gradients of one example's chunk of tokens, and the chunk's part of the scores.

    dpre = dh * act'(pre) [* up], dup = dh * act(pre)
    out[b, chunk, f] = sum over the chunk's tokens t of mask[b, t] * r(dh * act(pre) [* up])

    dh, pre, up, dpre, dup: [rows, F]; up is None for a plain MLP. dpre may be dh itself. mask: [rows], or None. out: [B,
    chunks, F] in float32. rows = B * T. Source: the formulas of `scored_mlp_backward`.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(neurons, NEURONS)
    chunks = tl.cdiv(tokens, CHUNK)
    neuron = program % blocks * NEURONS + tl.arange(0, NEURONS)
    chunk = program // blocks % chunks
    b = program // blocks // chunks
    first = b * tokens + chunk * CHUNK
    end = tl.minimum(first + CHUNK, (b + 1) * tokens)
    total = tl.zeros([NEURONS, STEP], tl.float32)
    for start in tl.range(first, end, STEP):
        row = start + tl.arange(0, STEP)
        inside = (neuron < neurons)[:, None] & (row < end)[None, :]
        of_tokens = tl.load(dh + neuron[:, None] + row[None, :] * neurons, mask=inside, other=0.0).to(tl.float32)
        total += part_of_tile(
            *(of_tokens, pre, up, mask, dpre, dup, row, neuron, end, neurons, pre_row, up_row, ACTIVATION, REDUCTION)
        )
    tl.store(out + (b * chunks + chunk) * neurons + neuron, tl.sum(total, 1), mask=neuron < neurons)


def launch_two_steps(
    g: Tensor, weight: Tensor, pre: Tensor, up: Tensor | None, mask: Tensor | None, activation: str, reduction: str
) -> list[Tensor]:
    """Run both steps. Return what `launch` returns. dh is rounded to the dtype of the inputs, as in PyTorch's own backward."""
    batch, tokens, neurons = pre.shape
    dh = torch.matmul(rows(g), weight)  # [rows, F]
    dup = [] if up is None else [torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)]
    chunks = triton.cdiv(tokens, CHUNK)
    partial = torch.empty(batch, chunks, neurons, dtype=torch.float32, device=pre.device)
    if partial.numel():
        of_pre, of_up = rows(pre), up if up is None else rows(up)
        with torch.cuda.device_of(g):
            activation_backward_kernel[(batch * chunks * triton.cdiv(neurons, NEURONS),)](
                *(dh, of_pre, of_up, mask if mask is None else mask.reshape(-1), dh, dup[0] if dup else dh, partial),
                *(tokens, neurons, of_pre.stride(0), 0 if of_up is None else of_up.stride(0)),
                *(CHUNK, STEP, NEURONS),
                ACTIVATION=activation,
                REDUCTION=reduction,
                **OPTIONS,
            )
    return [dh.view(pre.shape), *dup, sum_of_parts(partial)]
