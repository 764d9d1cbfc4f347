"""BERT, RoBERTa, ELECTRA: post-norm encoders, biases everywhere, a head size that stock configs derive from the hidden size."""

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
    for layer, block in blocks(model, "encoder.layer"):
        projections = [f"{block}.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
        yield attention(model, "encoder", layer, f"{block}.attention.self", projections, head_dim="attention_head_size")
        yield feed_forward(model, "encoder", layer, [f"{block}.intermediate.dense"], f"{block}.output.dense")


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    config.num_hidden_layers = len(kept["encoder"])
    return True


# By model class, the module that gets all tokens and reads the first one alone.
_READERS = {
    "BertForSequenceClassification": "bert.pooler",
    "RobertaForSequenceClassification": "classifier",
    "XLMRobertaForSequenceClassification": "classifier",
    "CamembertForSequenceClassification": "classifier",
    "ElectraForSequenceClassification": "classifier",
}

BERT = Family(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {
        "num_attention_heads": heads,
        "attention_head_size": head_dim,
        "all_head_size": heads * head_dim,
    },
    config_fields=fields(
        ffn=lambda ffn: {"intermediate_size": ffn.width},
        attention=lambda attention: {"num_attention_heads": attention.heads},
    ),
    keep_blocks=_keep_blocks,
    post_norm=lambda config: True,
    faster_forward=lambda model, needed: first_token_alone(model, "encoder.layer", _branches(model), _READERS, needed),
)
