"""DistilBERT: BERT's post-norm blocks under names of their own."""

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
    for layer, block in blocks(model, "transformer.layer"):
        path = f"{block}.attention"
        projections = [f"{path}.{name}_lin" for name in ("q", "k", "v", "out")]
        yield attention(model, "encoder", layer, path, projections, head_dim="attention_head_size")
        yield feed_forward(model, "encoder", layer, [f"{block}.ffn.lin1"], f"{block}.ffn.lin2")


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    config.n_layers = len(kept["encoder"])
    return True


DISTILBERT = Family(
    model_types=("distilbert",),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {
        "n_heads": heads,
        "attention_head_size": head_dim,
        "dim": heads * head_dim,
    },
    config_fields=fields(
        ffn=lambda ffn: {"hidden_dim": ffn.width},
        attention=lambda attention: {"n_heads": attention.heads},
    ),
    keep_blocks=_keep_blocks,
    post_norm=lambda config: True,
    faster_forward=lambda model, needed: first_token_alone(
        model, "transformer.layer", _branches(model), {"DistilBertForSequenceClassification": ""}, needed
    ),
)
