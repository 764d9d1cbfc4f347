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


@contextmanager
def bfloat16_attention(model: nn.Module) -> Iterator[None]:
    """Within it a model's attention to tokens on both sides, in bfloat16, is two matrix products with a softmax between them,
    where it is PyTorch's fused kernel ("sdpa") otherwise, and the CPU is an AMD that multiplies bfloat16 in vectors: half to
    three quarters of that kernel's time on Zen 4 and 5. (An Intel that does so too, without AMX, takes as long.) Scores are
    rounded to bfloat16, as in transformers' "eager"."""
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
    return any(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in model.parameters())


@cache
def _products_are_faster() -> bool:
    return "AMD" in cpu_name() and bool(capabilities().get("avx512_bf16"))


@cache
def _register() -> None:
    """Makes it known to transformers, with the masks of "sdpa"; and to compilers, whose own softmax takes longer, as one
    operation."""
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
    """transformers' interface: query, key, value [B, heads, tokens, head_dim] to [B, tokens, heads, head_dim]."""
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

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    attend = getattr(torch.ops.secateur, _NAME) if torch.compiler.is_compiling() else _attend
    return attend(query, key, value, attention_mask, scaling), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """mask: [rows or 1, heads or 1, tokens or 1, tokens], bool."""
    rows, heads, tokens, channels = query.shape
    query, key, value = (each.reshape(rows * heads, tokens, channels) for each in (query * scaling, key, value))
    scores = torch.bmm(query, key.transpose(1, 2))
    if mask is not None:  # Mostly of padding, which stands at the end: what stands before it need not be looked at again.
        begin = int(mask.flatten(0, -2).all(0).int().cumprod(0).sum())
        scores.view(rows, heads, tokens, tokens)[..., begin:].masked_fill_(~mask[..., begin:], float("-inf"))
    torch.softmax(scores, -1, out=scores)
    found = torch.bmm(scores, value).view(rows, heads, tokens, channels)
    return found.transpose(1, 2).contiguous()
