"""T5, FLAN-T5, mT5: pre-norm encoder-decoder, plain or gated FFN, a relative position bias held by each stack's first block."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.model.branches import Branch, attentions
from secateur.model.families.base import Family, attention, feed_forward, fields
from secateur.model.paths import blocks
from secateur.model.recipe import Rebuild
from secateur.model.shortcuts.few_queries import few_queries
from secateur.model.sites import Stack
from secateur.support.compat import own_modules, t5_position_buckets

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
    """Cut the tables of position biases.

    A stack's first attention computes the bias for its own heads and hands it on. Once it has no heads, the next one does so.
    Where layers keep other heads than the first, each gets the table of its own heads and computes its bias itself.
    """
    present = [branch for branch in attentions(_branches(model)) if branch.heads]
    heads = {branch: kept.get(branch.name, torch.arange(branch.heads)) for branch in present}
    for stack in ("encoder", "decoder"):
        layers = [a for a in present if a.stack == stack and a.kind == "self_attention"]
        if not any(a.name in kept for a in layers):
            continue
        left = [a for a in layers if len(heads[a])]
        alike = all(torch.equal(heads[left[0]], heads[a]) for a in left)
        for layer in layers:
            path = f"{layer.path}.relative_attention_bias"
            own = "relative_attention_bias" in own_modules(model.get_submodule(layer.path))
            makes = layer in (left[:1] if alike else left)
            if own or makes:
                rebuild.embedding(model, path, path if own else f"{layers[0].path}.relative_attention_bias", heads[layer])
            if makes and not (own and alike):
                rebuild.attributes(layer.path, {"has_relative_attention_bias": True})
            if makes and not alike:
                rebuild.recipe["own_position_bias"].append(layer.path)
    cross = [a for a in present if a.kind == "cross_attention" and len(heads[a])]
    if len({len(heads[a]) for a in cross}) > 1:  # Their bias is zero, but has an entry for each head.
        rebuild.recipe["own_position_bias"] += [a.path for a in cross]


def _place_in_decoder(model: nn.Module, positions: Tensor) -> list[RemovableHandle]:
    """Make each bias table return the rows of the buckets between these positions, whatever buckets it gets."""
    return [
        maker.relative_attention_bias.register_forward_hook(partial(_instead, maker, positions))
        for maker in _bias_makers(model, "decoder")
    ]


def _instead(attention: Any, positions: Tensor, table: nn.Embedding, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    buckets = _buckets(attention, positions[None, :] - positions[:, None])
    rows: Tensor = table.forward(buckets.to(output.device))  # Without hooks such as this one.
    return rows


def _bias_makers(model: nn.Module, stack: Stack) -> list[Any]:
    """Return the attention modules of a stack that hold a bias table."""
    modules = [model.get_submodule(branch.path) for branch in attentions(_branches(model)) if branch.stack == stack]
    return [module for module in modules if hasattr(module, "relative_attention_bias")]


def _buckets(attention: Any, distances: Tensor) -> Tensor:
    """Return the buckets of distances from queries to keys, in the shape of the distances."""
    return t5_position_buckets(
        distances,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )


@contextmanager
def _faster_forward(model: nn.Module, needed: Collection[str]) -> Iterator[None]:
    with _distances_looked_up(model), few_queries(model, _branches(model), needed, mask="mask", outputs=_attention_outputs):
        yield


def _attention_outputs(output: Tensor, arguments: dict[str, Any]) -> tuple[Any, ...]:
    return output, arguments.get("position_bias"), None


@contextmanager
def _distances_looked_up(model: nn.Module) -> Iterator[None]:
    """A context in which the encoder looks up the bias of each distance, of which there are few.

    The stock code finds the bucket of each pair of tokens, which takes a tenth of a pass over 300 tokens. Where the table is
    offloaded, it stays.
    """
    makers = [maker for maker in _bias_makers(model, "encoder") if not maker.relative_attention_bias.weight.is_meta]
    for maker in makers:
        buckets = _encoder_buckets(
            maker.relative_attention_num_buckets,
            maker.relative_attention_max_distance,
            maker.relative_attention_bias.weight.device,
        )
        vars(maker).update(encoder_buckets=buckets, compute_bias=partial(_bias_of_distances, maker))
    try:
        yield
    finally:
        for maker in makers:
            del maker.encoder_buckets, maker.compute_bias


def _bias_of_distances(
    attention: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int = 0
) -> Tensor:
    """Return the bias [1, heads, query_length, key_length], in place of T5Attention.compute_bias."""
    buckets, most = attention.encoder_buckets, len(attention.encoder_buckets) // 2
    keys, queries = (torch.arange(length, device=buckets.device) for length in (key_length, query_length))
    distances = (keys - queries[:, None] - past_seen_tokens).clamp(-most, most)
    of_distance: Tensor = attention.relative_attention_bias(buckets).T.contiguous()
    return of_distance.index_select(1, distances.flatten() + most).view(1, -1, query_length, key_length)


@cache  # Cached, so that torch.compile reuses the compiled code.
def _encoder_buckets(buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Return the buckets [2 * n + 1] of the distances from -n to n. Larger distances share the bucket of n."""
    n = max(max_distance, buckets)
    with torch.inference_mode(False):  # A later pass may need gradients.
        distances = torch.arange(-n, n + 1, device=device)
        of_distances = t5_position_buckets(distances, num_buckets=buckets, max_distance=max_distance)
        return nn.Parameter(of_distances, requires_grad=False)  # A compiler takes a frozen parameter as a constant.


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
    config_fields=fields(
        ffn=lambda ffn: {"d_ff": ffn.width},
        attention=lambda attention: {"num_heads": attention.heads, "d_kv": attention.head_dim},
    ),
    cut_position_bias=_cut_position_bias,
    keep_blocks=_keep_blocks,
    place_in_decoder=_place_in_decoder,
    faster_forward=_faster_forward,
    heads_in_stock="shared",  # The table of relative positions, which a stack's layers share, has a column for each head.
)
