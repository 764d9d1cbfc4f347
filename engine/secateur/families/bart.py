"""BART, Marian: post-norm encoder-decoders whose stacks have heads and widths of their own, positions from a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.families.base import Family, layer_lists, linear_width, number
from secateur.site import Attention, Branch, FeedForward, Stack


def _branches(model: nn.Module) -> Iterator[Branch]:
    stacks: tuple[Stack, ...] = ("encoder", "decoder")
    for stack in stacks:
        for layers in layer_lists(model, f"{stack}.layers"):
            for layer, _ in enumerate(model.get_submodule(layers).children()):
                block = f"{layers}.{layer}"
                yield _attention(model, stack, "self_attention", layer, f"{block}.self_attn")
                if stack == "decoder":
                    yield _attention(model, stack, "cross_attention", layer, f"{block}.encoder_attn")
                width = linear_width(model, f"{block}.fc1")
                yield FeedForward(f"{stack}.{layer}.ffn", stack, layer, (f"{block}.fc1",), f"{block}.fc2", width)


def _attention(
    model: nn.Module, stack: Stack, kind: Literal["self_attention", "cross_attention"], layer: int, path: str
) -> Attention:
    head_dim = number(model, path, "head_dim")
    heads = linear_width(model, f"{path}.q_proj") // head_dim
    projections = (f"{path}.q_proj", f"{path}.k_proj", f"{path}.v_proj", f"{path}.out_proj")
    return Attention(f"{stack}.{layer}.{kind}", kind, stack, layer, path, *projections, heads, heads, head_dim)


def _place_in_decoder(model: nn.Module, positions: Tensor) -> list[RemovableHandle]:
    """The decoder's table gives the rows of these positions, whatever it is asked for."""
    tables = [module for path, module in model.named_modules() if path.endswith("decoder.embed_positions")]

    def instead(table: Any, arguments: Any, output: Tensor) -> Tensor:
        return nn.functional.embedding(positions.to(output.device) + getattr(table, "offset", 0), table.weight)

    return [table.register_forward_hook(instead) for table in tables]


BART = Family(
    model_types=("bart", "marian"),
    branches=_branches,
    attention_attributes=lambda heads, groups, head_dim: {
        "num_heads": heads,
        "head_dim": head_dim,
        "embed_dim": heads * head_dim,
    },
    config_fields=lambda branch: (
        {f"{branch.stack}_ffn_dim": branch.width}
        if isinstance(branch, FeedForward)
        else {f"{branch.stack}_attention_heads": branch.heads}
    ),
    place_in_decoder=_place_in_decoder,
)
