"""Family: the facts about one architecture, and helpers that make its branches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.model.branches import Attention, Branch, FeedForward
from secateur.model.linear_layers import is_kind, weight_of
from secateur.model.modeling import ScatterLinear
from secateur.model.recipe import Rebuild
from secateur.model.sites import InStock, Stack


@dataclass(frozen=True)
class Contribution:
    """The module whose output is what a branch adds to the residual stream.

    To scale the output by z, the module's weight w becomes z * (w + offset) - offset and its bias is multiplied by z.

    Attributes:
        path: The path of the module.
        offset: The number that the module adds to its weight before it multiplies.
    """

    path: str
    offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_types: The values of config.model_type.
        branches: Yields the prunable branches of a model in forward order.
        attention_attributes: Maps (heads, groups, head_dim) to the attributes of an attention module that hold its shape.
        config_fields: Returns the config fields, with their values, that describe a branch; `fields` makes it from two
            functions. All branches must agree on them.
        cut_position_bias: Called with the model, the kept heads by branch name and the `Rebuild` under way, where an
            attention's position bias has an entry for each head.
        contribution: Returns a branch's contribution where it is not its out-projection's output (a norm may follow).
        place_in_decoder: For encoder-decoders. Registers hooks and returns their handles. Under these hooks the decoder takes
            the tokens of a pass to stand at the given positions (int64 [tokens]) instead of one after the other.
        keep_blocks: Changes a config (a model's, or a stack's own copy) to that of a model with the given blocks alone, by
            stack, and returns True; or returns False where no config describes that model. None where no config counts blocks.
        post_norm: Whether, by a config, the blocks norm the residual stream itself, so that one without its branches still does
            something.
        faster_forward: A context in which a model computes the same in fewer operations, where its own code repeats work or
            computes what no head reads. The arguments are the model and the paths of the linear layers that must run.
        cached_label_tree: For decoders alone. Whether tokens that follow cached states attend as a 4-dimensional mask of each
            layer type says, and stand where `position_ids` says.
        split_token_rows: For models that run some branch on all tokens in one row [B * T, channels]. Registers hooks and
            returns their handles. Under these hooks the branch's linear layers see [B, T, channels] as all others do.
        heads_in_stock: `Site.in_stock` of self-attention: "whole" where a config derives the head size from the heads' number.
    """

    model_types: tuple[str, ...]
    branches: Callable[[nn.Module], Iterator[Branch]]
    attention_attributes: Callable[[int, int, int], dict[str, Any]]
    config_fields: Callable[[Branch], dict[str, Any]]
    cut_position_bias: Callable[[nn.Module, dict[str, Tensor], Rebuild], None] | None = None
    contribution: Callable[[nn.Module, Branch], Contribution] = lambda model, branch: Contribution(branch.output)
    place_in_decoder: Callable[[nn.Module, Tensor], list[RemovableHandle]] | None = None
    keep_blocks: Callable[[Any, Mapping[Stack, Sequence[int]]], bool] | None = None
    post_norm: Callable[[Any], bool] = lambda config: False
    faster_forward: Callable[[nn.Module, Collection[str]], AbstractContextManager[None]] | None = None
    cached_label_tree: bool = False
    split_token_rows: Callable[[nn.Module], list[RemovableHandle]] | None = None
    heads_in_stock: InStock = "whole"


def attention(
    model: nn.Module,
    stack: Stack,
    layer: int,
    path: str,
    projections: Sequence[str],
    *,
    kind: Literal["self_attention", "cross_attention"] = "self_attention",
    head_dim: str = "head_dim",
    **options: Any,
) -> Attention:
    """Return an attention branch whose numbers of heads follow from its layers.

    Args:
        model: The model.
        stack: The stack that the branch belongs to.
        layer: The number of its layer.
        path: The path of its module.
        projections: The paths of the layers of queries, keys and values and of the out-projection. The first three may be one.
        kind: The kind of attention.
        head_dim: The attribute of the module that holds the number of channels of a head.
        options: Further fields of `Attention`.
    """
    query, key, value, output = projections
    width = int(getattr(model.get_submodule(path), head_dim))
    parts = 3 if query == value else 1
    heads, groups = (linear_width(model, projection) // width // parts for projection in (query, key))
    name = f"{stack}.{layer}.{kind}"
    return Attention(name, kind, stack, layer, path, query, key, value, output, heads, groups, width, **options)


def feed_forward(
    model: nn.Module, stack: Stack, layer: int, inputs: Sequence[str], output: str, *, parts: int = 1
) -> FeedForward:
    """Return a feed-forward branch of the layers at these paths. Its width follows from the first in-projection."""
    width = linear_width(model, inputs[0]) // parts
    return FeedForward(f"{stack}.{layer}.ffn", stack, layer, tuple(inputs), output, width, parts)


def fields(
    *, ffn: Callable[[FeedForward], dict[str, Any]], attention: Callable[[Attention], dict[str, Any]]
) -> Callable[[Branch], dict[str, Any]]:
    """Return `Family.config_fields` from one function for feed-forward branches and one for attention branches."""
    return lambda branch: branch.match(ffn=ffn, attention=attention)


def linear_width(model: nn.Module, path: str) -> int:
    """Return the outputs of a linear layer as built. Once the model is pruned, its config may say otherwise."""
    module: Any = model.get_submodule(path)
    return len(module.slots) if is_kind(module, ScatterLinear) else len(weight_of(module))
