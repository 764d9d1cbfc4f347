"""product_sum in Triton. It reads both tensors once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur_kernels.tiles import OPTIONS, size_class, sum_of_parts, tuned

# Tokens that one program sums. With this number few examples still give enough programs, and the partial sums are under 2% of
# the bytes that are read.
CHUNK = 128
# Tokens that are summed before their sum is added to the total. This allows many loads at once, and rounds less than adding the
# tokens one by one.
GROUP = 8


@tuned(
    {"CHANNELS": 512, "num_warps": 4},
    {"CHANNELS": 256, "num_warps": 2},
    {"CHANNELS": 256, "num_warps": 4},
    key=["size", "channels"],
)
@triton.jit
def product_sum_kernel(
    x,
    dx,
    mask,
    out,
    tokens,
    channels,
    size,
    x_batch,
    x_token,
    x_channel,
    dx_batch,
    dx_token,
    dx_channel,
    mask_batch,
    mask_token,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sum the products of one example's chunk of tokens.

    out[b, chunk, c] = sum over the chunk's tokens t, group by group, of mask[b, t] * x[b, t, c] * dx[b, t, c]

    x, dx: [B, T, C]. mask: [B, T], or None. out: [B, chunks, C] in float32. All strides are arguments. size: for the tuning's
    key. Source: Yang et al. 2023, arXiv 2205.04157, Eq. 4-5.
    """
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
    total = tl.zeros([CHANNELS], tl.float32)
    count = tl.minimum(CHUNK, tokens - first).to(tl.int32)
    for start in tl.range(0, count, GROUP):
        group = tl.zeros([CHANNELS], tl.float32)
        for k in tl.static_range(GROUP):
            inside = channel < tl.where(start + k < count, channels, 0)
            activation = tl.load(x_row + k * x_token + channel * x_channel, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.load(dx_row + k * dx_token + channel * dx_channel, mask=inside, other=0.0).to(tl.float32)
            product = activation * gradient
            if mask is not None:
                product *= tl.load(mask_at + tl.minimum(start + k, count - 1) * mask_token).to(tl.float32)
            group += product
        total += group
        x_row += GROUP * x_token
        dx_row += GROUP * dx_token
    tl.store(out + (b * chunks + chunk) * channels + channel, total, mask=channel < channels)


def launch(x: Tensor, dx: Tensor, mask: Tensor | None) -> Tensor:
    """Run the kernel on x and dx [B, T, C], and return the sums [B, C] in float32."""
    batch, tokens, channels = x.shape
    chunks = triton.cdiv(tokens, CHUNK)
    partial = torch.empty(batch, chunks, channels, dtype=torch.float32, device=x.device)
    if partial.numel():
        strides = *x.stride(), *dx.stride(), *((0, 0) if mask is None else mask.stride())
        with torch.cuda.device_of(x):
            product_sum_kernel[lambda meta: (batch * chunks * triton.cdiv(channels, meta["CHANNELS"]),)](
                *(x, dx, mask, partial, tokens, channels, size_class(batch * tokens), *strides),
                CHUNK=CHUNK,
                GROUP=GROUP,
                **OPTIONS,
            )
    return sum_of_parts(partial)
