"""ViT: pre-norm encoder over the patches of an image, biases everywhere; every image has the same number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.model.branches import Branch
from secateur.model.families.base import Family, attention, feed_forward, fields
from secateur.model.paths import blocks
from secateur.model.shortcuts.first_token import first_token_alone
from secateur.model.sites import Stack


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layer, block in blocks(model, "layers"):
        path = f"{block}.attention"
        yield attention(model, "encoder", layer, path, [f"{path}.{name}_proj" for name in "qkvo"])
        yield feed_forward(model, "encoder", layer, [f"{block}.mlp.fc1"], f"{block}.mlp.fc2")


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    config.num_hidden_layers = len(kept["encoder"])
    return True


VIT = Family(
    model_types=("vit",),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {"num_attention_heads": heads, "head_dim": head_dim},
    # The stock attention reads head_dim from a config that has it. The default is the hidden size divided by the heads.
    config_fields=fields(
        ffn=lambda ffn: {"intermediate_size": ffn.width},
        attention=lambda attention: {"num_attention_heads": attention.heads, "head_dim": attention.head_dim},
    ),
    keep_blocks=_keep_blocks,
    faster_forward=lambda model, needed: first_token_alone(
        model, "layers", _branches(model), {"ViTForImageClassification": ""}, needed, norm="layernorm_before"
    ),
)
