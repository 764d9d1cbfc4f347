"""ViT: pre-norm encoder over the patches of an image, biases everywhere; every image has the same number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.families.base import Family, layer_lists, linear_width, number
from secateur.site import Attention, Branch, FeedForward, Stack


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layers in layer_lists(model, "layers"):
        for layer, _ in enumerate(model.get_submodule(layers).children()):
            attention, mlp = f"{layers}.{layer}.attention", f"{layers}.{layer}.mlp"
            head_dim = number(model, attention, "head_dim")
            heads = linear_width(model, f"{attention}.q_proj") // head_dim
            yield Attention(
                f"encoder.{layer}.self_attention", "self_attention", "encoder", layer, attention,
                f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj", f"{attention}.o_proj",
                heads, heads, head_dim,
            )  # fmt: skip
            inner = f"{mlp}.fc1"
            yield FeedForward(f"encoder.{layer}.ffn", "encoder", layer, (inner,), f"{mlp}.fc2", linear_width(model, inner))


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    config.num_hidden_layers = len(kept["encoder"])
    return True


VIT = Family(
    model_types=("vit",),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {"num_attention_heads": heads, "head_dim": head_dim},
    # The stock attention reads head_dim where a config has it; by default it is the hidden size over the heads.
    config_fields=lambda branch: (
        {"intermediate_size": branch.width}
        if isinstance(branch, FeedForward)
        else {"num_attention_heads": branch.heads, "head_dim": branch.head_dim}
    ),
    keep_blocks=_keep_blocks,
)
