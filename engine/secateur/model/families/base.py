"""What a family tells about its models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.model.branches import Attention, Branch, FeedForward
from secateur.model.linear_layers import weight_of
from secateur.model.modeling import ScatterLinear
from secateur.model.recipe import Rebuild
from secateur.model.sites import Stack


@dataclass(frozen=True)
class Contribution:
    """Where what a branch adds to the residual stream is the output of one module.

    The output is z times as much once the module's weight w is z * (w + offset) - offset, and its bias z times as much.
    """

    path: str
    offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """One architecture.

    model_types: the values of config.model_type. branches: yields the prunable branches in forward order.
    attention_attributes: (heads, groups, head_dim) to the attributes of an attention module that say its shape.
    config_fields: the fields, with their values, of a config that describes a branch; all branches must agree on them.
    cut_position_bias: called with the model, the kept heads by branch name and the `Rebuild` under way, where an
    attention's position bias has an entry for each head.
    contribution: where a branch's contribution is not its out-projection's output (a norm may follow).
    place_in_decoder: of encoder-decoders: registers hooks under which the decoder takes the tokens of a pass to stand at the
    given positions (int64 [tokens]) instead of one after the other, and returns their handles.
    keep_blocks: makes a config (a model's, or a stack's own copy) that of a model with these blocks alone, by stack, and
    returns True; or False where no config does. None where a block without its branches always does something, as the norms of
    post-norm blocks do.
    faster_forward: a context in which a model computes the same in fewer operations, where its own code repeats itself.
    split_token_rows: of models that run some branch on all tokens in one row [B * T, channels]: registers hooks under which its
    linear layers see [B, T, channels] as all others do, and returns their handles.
    """

    model_types: tuple[str, ...]
    branches: Callable[[nn.Module], Iterator[Branch]]
    attention_attributes: Callable[[int, int, int], dict[str, Any]]
    config_fields: Callable[[Branch], dict[str, Any]]
    cut_position_bias: Callable[[nn.Module, dict[str, Tensor], Rebuild], None] | None = None
    contribution: Callable[[nn.Module, Branch], Contribution] = lambda model, branch: Contribution(branch.output)
    place_in_decoder: Callable[[nn.Module, Tensor], list[RemovableHandle]] | None = None
    keep_blocks: Callable[[Any, Mapping[Stack, Sequence[int]]], bool] | None = None
    faster_forward: Callable[[nn.Module], AbstractContextManager[None]] | None = None
    split_token_rows: Callable[[nn.Module], list[RemovableHandle]] | None = None


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
    """An attention branch, whose numbers of heads follow from its layers. path: of its module, which holds the attribute
    `head_dim`; projections: paths of the layers of queries, keys, values and of the out-projection, of which the first three
    may be one; options: further fields."""
    query, key, value, output = projections
    width = int(getattr(model.get_submodule(path), head_dim))
    made = 3 if query == value else 1
    heads, groups = (linear_width(model, each) // width // made for each in (query, key))
    name = f"{stack}.{layer}.{kind}"
    return Attention(name, kind, stack, layer, path, query, key, value, output, heads, groups, width, **options)


def feed_forward(
    model: nn.Module, stack: Stack, layer: int, inputs: Sequence[str], output: str, *, parts: int = 1
) -> FeedForward:
    """A feed-forward branch of the layers at these paths, whose width is theirs."""
    width = linear_width(model, inputs[0]) // parts
    return FeedForward(f"{stack}.{layer}.ffn", stack, layer, tuple(inputs), output, width, parts)


def fields(
    *, ffn: Callable[[FeedForward], dict[str, Any]], attention: Callable[[Attention], dict[str, Any]]
) -> Callable[[Branch], dict[str, Any]]:
    """Return `Family.config_fields` from one function for feed-forward branches and one for attention branches."""
    return lambda branch: branch.match(ffn=ffn, attention=attention)


def linear_width(model: nn.Module, path: str) -> int:
    """Outputs of a linear layer, as built (the config may say otherwise once the model is pruned)."""
    module = model.get_submodule(path)
    return len(module.slots) if isinstance(module, ScatterLinear) else len(weight_of(module))
