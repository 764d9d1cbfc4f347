"""DistilBERT: BERT's post-norm blocks under names of their own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from secateur.families.base import Family, layer_lists, linear_width, number
from secateur.site import Attention, Branch, FeedForward


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layers in layer_lists(model, "transformer.layer"):
        for layer, _ in enumerate(model.get_submodule(layers).children()):
            attention, ffn = f"{layers}.{layer}.attention", f"{layers}.{layer}.ffn"
            head_dim = number(model, attention, "attention_head_size")
            heads = linear_width(model, f"{attention}.q_lin") // head_dim
            yield Attention(
                f"encoder.{layer}.self_attention", "self_attention", "encoder", layer, attention,
                f"{attention}.q_lin", f"{attention}.k_lin", f"{attention}.v_lin", f"{attention}.out_lin",
                heads, heads, head_dim,
            )  # fmt: skip
            width = linear_width(model, f"{ffn}.lin1")
            yield FeedForward(f"encoder.{layer}.ffn", "encoder", layer, (f"{ffn}.lin1",), f"{ffn}.lin2", width)


DISTILBERT = Family(
    model_types=("distilbert",),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {
        "n_heads": heads,
        "attention_head_size": head_dim,
        "dim": heads * head_dim,
    },
    config_fields=lambda branch: {"hidden_dim": branch.width} if isinstance(branch, FeedForward) else {"n_heads": branch.heads},
)
