"""ModernBERT: pre-norm encoder, rotary positions; one layer makes queries, keys and values, one the gated FFN's two halves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.model.branches import Branch
from secateur.model.families.base import Family, attention, feed_forward, fields
from secateur.model.paths import blocks
from secateur.model.sites import Stack


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layer, block in blocks(model, "layers"):
        path = f"{block}.attn"
        yield attention(model, "encoder", layer, path, [f"{path}.Wqkv"] * 3 + [f"{path}.Wo"], rotary=True)
        yield feed_forward(model, "encoder", layer, [f"{block}.mlp.Wi"], f"{block}.mlp.Wo", parts=2)


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    if kept["encoder"][0] != 0:  # Only the first block has no norm before its attention.
        return False
    config.layer_types = [config.layer_types[layer] for layer in kept["encoder"]]
    config.num_hidden_layers = len(kept["encoder"])
    return True


MODERNBERT = Family(
    model_types=("modernbert",),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {"head_dim": head_dim},
    config_fields=fields(
        ffn=lambda ffn: {"intermediate_size": ffn.width},
        attention=lambda attention: {"num_attention_heads": attention.heads},
    ),
    keep_blocks=_keep_blocks,
)
