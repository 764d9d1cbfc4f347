"""Attention in bfloat16 on a CPU as two matrix products and a softmax, where PyTorch's fused kernel multiplies slowly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from secateur.support.compat import attention_implementation, set_attention_implementation
from secateur.support.environment import capabilities, cpu_name

_NAME = "bfloat16_by_products"
# Implementations of attention that take a mask of each query over all keys.
MASKED = ("eager", "sdpa", _NAME)


@contextmanager
def bfloat16_attention(model: nn.Module) -> Iterator[None]:
    """A context in which bidirectional attention in bfloat16 is two matrix products with a softmax between them.

    It applies where attention is PyTorch's fused kernel ("sdpa") otherwise and the CPU is an AMD that multiplies bfloat16 in
    vectors. There it takes half to three quarters of that kernel's time on Zen 4 and 5. (An Intel that multiplies so too,
    without AMX, takes as long.) Scores are rounded to bfloat16, as in transformers' "eager".
    """
    configs: dict[int, Any] = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    changed = [config for config in configs.values() if attention_implementation(config) == "sdpa"]
    if not (changed and _products_are_faster() and _is_bfloat16_on_cpu(model)):
        yield
        return
    _register()
    for config in changed:
        set_attention_implementation(config, _NAME)
    try:
        yield
    finally:
        for config in changed:
            set_attention_implementation(config, "sdpa")


def _is_bfloat16_on_cpu(model: nn.Module) -> bool:
    return any(p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in model.parameters())


@cache
def _products_are_faster() -> bool:
    return "AMD" in cpu_name() and bool(capabilities().get("avx512_bf16"))


@cache
def _register() -> None:
    """Register the attention with transformers, with the masks of "sdpa", and as one operation with compilers.

    A softmax that compilers generate takes longer.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    schema = "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling) -> Tensor"
    operation = torch.library.custom_op(f"secateur::{_NAME}", _attend, mutates_args=(), schema=schema)
    operation.register_fake(lambda query, *rest: torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format))


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """Return [B, T, heads, head_dim] from query, key and value [B, heads, T, head_dim], by transformers' interface."""
    ours = (
        query.dtype == torch.bfloat16
        and query.shape == key.shape
        and not options.get("is_causal", getattr(module, "is_causal", True))
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux", "cache"))
        and not (module.training or torch.is_grad_enabled())
    )
    if not ours:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return stock
    attend = getattr(torch.ops.secateur, _NAME) if torch.compiler.is_compiling() else _attend
    return attend(query, key, value, attention_mask, scaling), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return attention [B, T, heads, head_dim] by matrix products. mask: [B or 1, heads or 1, T or 1, T], bool."""
    rows, heads, tokens, channels = query.shape
    query, key, value = (tensor.reshape(rows * heads, tokens, channels) for tensor in (query * scaling, key, value))
    scores = torch.bmm(query, key.transpose(1, 2))
    if mask is not None:  # A mask mostly hides padding at the end, so that only the scores from there on are masked.
        begin = int(mask.flatten(0, -2).all(0).int().cumprod(0).sum())
        scores.view(rows, heads, tokens, tokens)[..., begin:].masked_fill_(~mask[..., begin:], float("-inf"))
    torch.softmax(scores, -1, out=scores)
    # Padding that is outside of all tokens' windows sees nothing. It gets 0, as in "sdpa". With NaN here, tokens of the next
    # layer that give it the weight 0 would be NaN.
    if mask is not None and not bool((sees := mask.any(-1, keepdim=True)).all()):
        scores.view(rows, heads, tokens, tokens).masked_fill_(~sees, 0.0)
    attended = torch.bmm(scores, value).view(rows, heads, tokens, channels)
    return attended.transpose(1, 2).contiguous()
