"""BART, Marian: post-norm encoder-decoders whose stacks have heads and widths of their own, positions from a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.model.branches import Branch
from secateur.model.families.base import Family, attention, feed_forward, fields
from secateur.model.paths import blocks
from secateur.model.shortcuts.few_queries import few_queries
from secateur.model.sites import Stack


def _branches(model: nn.Module) -> Iterator[Branch]:
    stacks: tuple[Stack, ...] = ("encoder", "decoder")
    for stack in stacks:
        for layer, block in blocks(model, f"{stack}.layers"):
            path, cross = f"{block}.self_attn", f"{block}.encoder_attn"
            yield attention(model, stack, layer, path, _projections(path))
            if stack == "decoder" and _has_encoder(model):
                yield attention(model, stack, layer, cross, _projections(cross), kind="cross_attention")
            yield feed_forward(model, stack, layer, [f"{block}.fc1"], f"{block}.fc2")


def _has_encoder(model: nn.Module) -> bool:
    """Return whether the decoder reads an encoder. BartForCausalLM has cross-attentions too, but never runs them."""
    config: Any = model.config
    return bool(config.is_encoder_decoder)


def _projections(path: str) -> list[str]:
    return [f"{path}.{name}_proj" for name in ("q", "k", "v", "out")]


def _place_in_decoder(model: nn.Module, positions: Tensor) -> list[RemovableHandle]:
    """Make the decoder's table return the rows of these positions, whatever positions it gets."""
    tables = [module for path, module in model.named_modules() if path.endswith("decoder.embed_positions")]

    def instead(table: Any, arguments: Any, output: Tensor) -> Tensor:
        rows: Tensor = table.forward(arguments[0], position_ids=positions.to(output.device))  # Without hooks such as this one.
        return rows

    return [table.register_forward_hook(instead) for table in tables]


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    for stack, numbers in kept.items():
        setattr(config, f"{stack}_layers", len(numbers))
    return True


BART = Family(
    model_types=("bart", "marian"),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {
        "num_heads": heads,
        "head_dim": head_dim,
        "embed_dim": heads * head_dim,
    },
    config_fields=fields(
        ffn=lambda ffn: {f"{ffn.stack}_ffn_dim": ffn.width},
        attention=lambda attention: {f"{attention.stack}_attention_heads": attention.heads},
    ),
    keep_blocks=_keep_blocks,
    post_norm=lambda config: True,
    place_in_decoder=_place_in_decoder,
    faster_forward=lambda model, needed: few_queries(model, _branches(model), needed),
)
