"""OPT: decoder with norms before or behind its branches, whose FFN runs on all tokens of a batch in one row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.model.branches import Branch
from secateur.model.families.base import Family, attention, feed_forward, fields
from secateur.model.paths import blocks
from secateur.model.sites import Stack


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layer, block in blocks(model, "decoder.layers"):
        path = f"{block}.self_attn"
        yield attention(model, "decoder", layer, path, [f"{path}.{name}_proj" for name in ("q", "k", "v", "out")])
        yield feed_forward(model, "decoder", layer, [f"{block}.fc1"], f"{block}.fc2")


def _keep_blocks(config: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    config.num_hidden_layers = len(kept["decoder"])
    return True


def _split_token_rows(model: nn.Module) -> list[RemovableHandle]:
    """Make each FFN's first layer read [B, T, channels] and its last return [B * T, channels] for the residual stream."""
    return [handle for _, block in blocks(model, "decoder.layers") for handle in _split_block_rows(model.get_submodule(block))]


def _split_block_rows(block: Any) -> list[RemovableHandle]:
    examples = 0

    def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal examples
        examples = len(arguments[0])

    def split(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (arguments[0].view(examples, -1, arguments[0].shape[-1]),) if arguments[0].dim() == 2 else None

    def join(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output.flatten(0, 1) if output.dim() == 3 else output

    return [
        block.register_forward_pre_hook(count),
        block.fc1.register_forward_pre_hook(split),
        block.fc2.register_forward_hook(join),
    ]


OPT = Family(
    model_types=("opt",),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {
        "num_heads": heads,
        "head_dim": head_dim,
        "embed_dim": heads * head_dim,
    },
    config_fields=fields(
        ffn=lambda ffn: {"ffn_dim": ffn.width},
        attention=lambda attention: {"num_attention_heads": attention.heads},
    ),
    keep_blocks=_keep_blocks,
    post_norm=lambda config: not config.do_layer_norm_before,
    cached_label_tree=True,
    split_token_rows=_split_token_rows,
)
