"""product_sum in Triton: one pass over both tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur_kernels.tiles import OPTIONS, tuned

CHUNK = 128  # Tokens that one program sums: enough programs for few examples; partial sums are under 2% of the bytes read.


@tuned(
    {"CHANNELS": 512, "num_warps": 4},
    {"CHANNELS": 256, "num_warps": 2},
    {"CHANNELS": 256, "num_warps": 4},
    key=["channels"],
)
@triton.jit
def product_sum_kernel(
    x,
    dx,
    mask,
    out,
    tokens,
    channels,
    x_batch,
    x_token,
    x_channel,
    dx_batch,
    dx_token,
    dx_channel,
    mask_batch,
    mask_token,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out[b, chunk, c] = sum over the chunk's tokens, one after the other, of mask[b, t] * x[b, t, c] * dx[b, t, c]."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, CHANNELS)
    chunks = tl.cdiv(tokens, CHUNK)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    chunk = program // blocks % chunks
    b = program // blocks // chunks
    first = chunk * CHUNK
    x_row = x + b * x_batch + first * x_token
    dx_row = dx + b * dx_batch + first * dx_token
    mask_at = mask if mask is None else mask + b * mask_batch + first * mask_token
    inside = channel < channels
    total = tl.zeros([CHANNELS], tl.float32)
    for _ in tl.range(0, tl.minimum(CHUNK, tokens - first).to(tl.int32), loop_unroll_factor=8):
        each_x = tl.load(x_row + channel * x_channel, mask=inside, other=0.0).to(tl.float32)
        each_dx = tl.load(dx_row + channel * dx_channel, mask=inside, other=0.0).to(tl.float32)
        product = each_x * each_dx
        if mask is not None:
            product *= tl.load(mask_at).to(tl.float32)
            mask_at += mask_token
        total += product
        x_row += x_token
        dx_row += dx_token
    tl.store(out + (b * chunks + chunk) * channels + channel, total, mask=inside)


def launch(x: Tensor, dx: Tensor, mask: Tensor | None) -> Tensor:
    batch, tokens, channels = x.shape
    chunks = triton.cdiv(tokens, CHUNK)
    partial = torch.empty(batch, chunks, channels, dtype=torch.float32, device=x.device)
    if partial.numel():
        strides = *x.stride(), *dx.stride(), *((0, 0) if mask is None else mask.stride())
        with torch.cuda.device_of(x):
            product_sum_kernel[lambda meta: (batch * chunks * triton.cdiv(channels, meta["CHANNELS"]),)](
                *(x, dx, mask, partial, tokens, channels, *strides), CHUNK=CHUNK, **OPTIONS
            )
    return partial[:, 0] if chunks == 1 else partial.sum(1)
