"""BERT, RoBERTa, ELECTRA: post-norm encoders, biases everywhere, a head size that stock configs derive from the hidden size."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from secateur.families.base import Family, layer_lists, linear_width, number
from secateur.site import Attention, Branch, FeedForward


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layers in layer_lists(model, "encoder.layer"):
        for layer, _ in enumerate(model.get_submodule(layers).children()):
            path = f"{layers}.{layer}"
            inner, attention = f"{path}.intermediate.dense", f"{path}.attention.self"
            head_dim = number(model, attention, "attention_head_size")
            heads = linear_width(model, f"{attention}.query") // head_dim
            yield Attention(
                f"encoder.{layer}.self_attention", "self_attention", "encoder", layer, attention,
                f"{attention}.query", f"{attention}.key", f"{attention}.value", f"{path}.attention.output.dense",
                heads, heads, head_dim,
            )  # fmt: skip
            width = linear_width(model, inner)
            yield FeedForward(f"encoder.{layer}.ffn", "encoder", layer, (inner,), f"{path}.output.dense", width)


BERT = Family(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {
        "num_attention_heads": heads,
        "attention_head_size": head_dim,
        "all_head_size": heads * head_dim,
    },
    config_fields=lambda branch: (
        {"intermediate_size": branch.width} if isinstance(branch, FeedForward) else {"num_attention_heads": branch.heads}
    ),
)
