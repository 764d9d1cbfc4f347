"""T5, FLAN-T5, mT5: pre-norm encoder-decoder, plain or gated FFN, a relative position bias held by each stack's first block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.families.base import Family, attention, blocks, feed_forward
from secateur.rebuild import Rebuild
from secateur.site import Attention, Branch, FeedForward, Stack

_HEAD_DIM = "key_value_proj_dim"


def _branches(model: nn.Module) -> Iterator[Branch]:
    names = {name for name, _ in model.named_modules()}
    stacks: tuple[Stack, ...] = ("encoder", "decoder")
    for stack in stacks:
        for layer, block in blocks(model, f"{stack}.block"):
            path, cross = f"{block}.layer.0.SelfAttention", f"{block}.layer.1.EncDecAttention"
            yield attention(model, stack, layer, path, [f"{path}.{name}" for name in "qkvo"], head_dim=_HEAD_DIM)
            if stack == "decoder":
                projections = [f"{cross}.{name}" for name in "qkvo"]
                yield attention(model, stack, layer, cross, projections, kind="cross_attention", head_dim=_HEAD_DIM)
            dense = f"{block}.layer.{2 if stack == 'decoder' else 1}.DenseReluDense"
            inputs = [f"{dense}.{name}" for name in ("wi", "wi_0", "wi_1") if f"{dense}.{name}" in names]
            yield feed_forward(model, stack, layer, inputs, f"{dense}.wo")


def _cut_position_bias(model: nn.Module, kept: dict[str, Tensor], rebuild: Rebuild) -> None:
    """A stack's first attention makes the bias of its own heads and hands it on. Once it has none, the next one does. Where
    layers keep other heads than the first, each gets the table of its own heads and makes its bias itself."""
    attentions = [branch for branch in _branches(model) if isinstance(branch, Attention) and branch.heads]
    heads = {a: kept.get(a.name, torch.arange(a.heads)) for a in attentions}
    for stack in ("encoder", "decoder"):
        layers = [a for a in attentions if a.stack == stack and a.kind == "self_attention"]
        if not any(a.name in kept for a in layers):
            continue
        left = [a for a in layers if len(heads[a])]
        alike = all(torch.equal(heads[left[0]], heads[a]) for a in left)
        for layer in layers:
            path = f"{layer.path}.relative_attention_bias"
            own = "relative_attention_bias" in model.get_submodule(layer.path)._modules
            makes = layer in (left[:1] if alike else left)
            if own or makes:
                rebuild.embedding(model, path, path if own else f"{layers[0].path}.relative_attention_bias", heads[layer])
            if makes and not (own and alike):
                rebuild.attributes(layer.path, {"has_relative_attention_bias": True})
            if makes and not alike:
                rebuild.recipe["own_position_bias"].append(layer.path)
    cross = [a for a in attentions if a.kind == "cross_attention" and len(heads[a])]
    if len({len(heads[a]) for a in cross}) > 1:  # Their bias is zero, but has a place for each head.
        rebuild.recipe["own_position_bias"] += [a.path for a in cross]


def _place_in_decoder(model: nn.Module, positions: Tensor) -> list[RemovableHandle]:
    """Each bias table gives the rows of the buckets between these positions, whatever buckets it is asked for."""
    handles = []
    for branch in _branches(model):
        attention: Any = model.get_submodule(branch.path) if isinstance(branch, Attention) else None
        if branch.stack == "decoder" and hasattr(attention, "relative_attention_bias"):
            table = attention.relative_attention_bias
            buckets = attention._relative_position_bucket(
                positions[None, :] - positions[:, None],
                bidirectional=False,
                num_buckets=attention.relative_attention_num_buckets,
                max_distance=attention.relative_attention_max_distance,
            )
            handles.append(table.register_forward_hook(partial(_instead, buckets.to(table.weight.device))))
    return handles


def _instead(buckets: Tensor, table: nn.Embedding, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    return nn.functional.embedding(buckets, table.weight)


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    if "decoder" in kept:
        config.num_decoder_layers = len(kept["decoder"])
    # The decoder's own copy counts the decoder's blocks in the encoder's field.
    own: Stack = "decoder" if config.is_decoder else "encoder"
    config.num_layers = len(kept[own])
    return True


T5 = Family(
    model_types=("t5", "mt5"),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {
        "n_heads": heads,
        "key_value_proj_dim": head_dim,
        "inner_dim": heads * head_dim,
    },
    config_fields=lambda branch: (
        {"d_ff": branch.width} if isinstance(branch, FeedForward) else {"num_heads": branch.heads, "d_kv": branch.head_dim}
    ),
    cut_position_bias=_cut_position_bias,
    keep_blocks=_keep_blocks,
    place_in_decoder=_place_in_decoder,
)
