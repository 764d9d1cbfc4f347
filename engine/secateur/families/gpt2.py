"""GPT-2: pre-norm decoder of Conv1D layers, one of which makes queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.families.base import Family, layer_lists, linear_width, number
from secateur.site import Attention, Branch, FeedForward, Stack


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layers in layer_lists(model, "h"):
        for layer, _ in enumerate(model.get_submodule(layers).children()):
            attention, mlp = f"{layers}.{layer}.attn", f"{layers}.{layer}.mlp"
            made = f"{attention}.c_attn"
            head_dim = number(model, attention, "head_dim")
            heads = linear_width(model, made) // head_dim // 3
            yield Attention(
                f"decoder.{layer}.self_attention", "self_attention", "decoder", layer, attention,
                made, made, made, f"{attention}.c_proj", heads, heads, head_dim,
            )  # fmt: skip
            width = linear_width(model, f"{mlp}.c_fc")
            yield FeedForward(f"decoder.{layer}.ffn", "decoder", layer, (f"{mlp}.c_fc",), f"{mlp}.c_proj", width)


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    if config.scale_attn_by_inverse_layer_idx:  # A block of another number would be another block.
        return False
    config.n_layer = len(kept["decoder"])
    return True


GPT2 = Family(
    model_types=("gpt2",),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {
        "num_heads": heads,
        "head_dim": head_dim,
        "embed_dim": heads * head_dim,
        "split_size": heads * head_dim,
    },
    config_fields=lambda branch: {"n_inner": branch.width} if isinstance(branch, FeedForward) else {"n_head": branch.heads},
    keep_blocks=_keep_blocks,
)
