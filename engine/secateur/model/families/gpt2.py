"""GPT-2: pre-norm decoder of Conv1D layers, one of which makes queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.model.branches import Branch
from secateur.model.families.base import Family, attention, feed_forward, fields
from secateur.model.paths import blocks
from secateur.model.sites import Stack


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layer, block in blocks(model, "h"):
        path = f"{block}.attn"
        yield attention(model, "decoder", layer, path, [f"{path}.c_attn"] * 3 + [f"{path}.c_proj"])
        yield feed_forward(model, "decoder", layer, [f"{block}.mlp.c_fc"], f"{block}.mlp.c_proj")


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    if config.scale_attn_by_inverse_layer_idx:  # A block with another number would compute something else.
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
    config_fields=fields(
        ffn=lambda ffn: {"n_inner": ffn.width},
        attention=lambda attention: {"n_head": attention.heads},
    ),
    keep_blocks=_keep_blocks,
    cached_label_tree=True,
)
