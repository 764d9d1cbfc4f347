"""ModernBERT: pre-norm encoder, rotary positions; one layer makes queries, keys and values, one the gated FFN's two halves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.families.base import Family, layer_lists, linear_width, number
from secateur.site import Attention, Branch, FeedForward, Stack


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layers in layer_lists(model, "layers"):
        for layer, _ in enumerate(model.get_submodule(layers).children()):
            attention, mlp = f"{layers}.{layer}.attn", f"{layers}.{layer}.mlp"
            made = f"{attention}.Wqkv"
            head_dim = number(model, attention, "head_dim")
            heads = linear_width(model, made) // head_dim // 3
            yield Attention(
                f"encoder.{layer}.self_attention", "self_attention", "encoder", layer, attention,
                made, made, made, f"{attention}.Wo", heads, heads, head_dim, rotary=True,
            )  # fmt: skip
            width = linear_width(model, f"{mlp}.Wi") // 2
            yield FeedForward(f"encoder.{layer}.ffn", "encoder", layer, (f"{mlp}.Wi",), f"{mlp}.Wo", width, parts=2)


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    if kept["encoder"][0] != 0:  # The first block alone has no norm before its attention.
        return False
    config.layer_types = [config.layer_types[layer] for layer in kept["encoder"]]
    config.num_hidden_layers = len(kept["encoder"])
    return True


MODERNBERT = Family(
    model_types=("modernbert",),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {"head_dim": head_dim},
    config_fields=lambda branch: (
        {"intermediate_size": branch.width} if isinstance(branch, FeedForward) else {"num_attention_heads": branch.heads}
    ),
    keep_blocks=_keep_blocks,
)
