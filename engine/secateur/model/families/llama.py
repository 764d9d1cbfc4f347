"""Llama, Mistral, Qwen, Gemma: pre-norm decoders, grouped key-value heads, rotary positions, gated FFN; some norm Q and K."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.model.branches import Branch
from secateur.model.families.base import Contribution, Family, attention, feed_forward, fields
from secateur.model.paths import blocks
from secateur.model.sites import Stack

# The name of the module that computes a branch and the name of the norm behind it, by kind.
_INNER_AND_NORM = {
    "self_attention": ("self_attn", "post_attention_layernorm"),
    "ffn": ("mlp", "post_feedforward_layernorm"),
}


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layer, block in blocks(model, "layers"):
        path, mlp = f"{block}.self_attn", f"{block}.mlp"
        refused = None
        if hasattr(model.get_submodule(path), "q_norm"):
            refused = "queries and keys are normalised over the head, so removing a channel changes the others"
        projections = [f"{path}.{name}_proj" for name in "qkvo"]
        yield attention(model, "decoder", layer, path, projections, rotary=True, channels_refused=refused)
        yield feed_forward(model, "decoder", layer, [f"{mlp}.gate_proj", f"{mlp}.up_proj"], f"{mlp}.down_proj")


def _contribution(model: nn.Module, branch: Branch) -> Contribution:
    """Return the norm behind a branch for Gemma, otherwise the out-projection.

    Gemma normalises the output of a branch before it is added, so that the norm would divide out a factor on the
    out-projection. Gemma's norms multiply by 1 + weight. In other models the norm of the same name stands before the FFN.
    """
    inner, norm = _INNER_AND_NORM[branch.kind]
    block = branch.output.partition(f".{inner}.")[0]
    if not hasattr(model.get_submodule(block), "post_feedforward_layernorm"):
        return Contribution(branch.output)
    return Contribution(f"{block}.{norm}", offset=1.0)


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[layer] for layer in kept["decoder"]]
    config.num_hidden_layers = len(kept["decoder"])
    return True


LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {
        "head_dim": head_dim,
        "num_key_value_groups": heads // groups,
    },
    config_fields=fields(
        ffn=lambda ffn: {"intermediate_size": ffn.width},
        attention=lambda attention: {
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.groups,
            "head_dim": attention.head_dim,
        },
    ),
    contribution=_contribution,
    keep_blocks=_keep_blocks,
    cached_label_tree=True,
    heads_in_stock="free",
)
