"""Cross-attention of a few tokens to many: queries are taken to where keys come from, so that no key and no value is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.site import Attention


@contextmanager
def few_queries(
    model: nn.Module, cross: Iterable[Attention], *, mask: str, outputs: Callable[[Tensor, dict[str, Any]], tuple[Any, ...]]
) -> Iterator[None]:
    """Within it the model's cross-attentions attend as `_attend` does, where that is fewer operations, with the same outputs up
    to rounding. Keys and values are a seventh of FLAN-T5 base's products of an input with weights.

    mask: the name of the argument of the module's forward that holds it. outputs: what that forward returns, of its output and
    its arguments. Modules stay as they are where heads share keys, and where somebody hooked or replaced a layer.
    """
    found: list[tuple[Any, Attention]] = [(model.get_submodule(each.path), each) for each in cross if _plain(model, each)]
    for attention, branch in found:
        layers: list[Any] = [model.get_submodule(path) for path in (branch.query, branch.key, branch.value, branch.output)]
        attend = partial(_attend, layers, branch.heads, attention.scaling)
        vars(attention)["forward"] = partial(_forward, attention.forward, attend, branch.head_dim // 2, mask, outputs)
    try:
        yield
    finally:
        for attention, _ in found:
            del attention.forward


def _plain(model: nn.Module, branch: Attention) -> bool:
    attention, key, value = (model.get_submodule(path) for path in (branch.path, branch.key, branch.value))
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        branch.heads == branch.groups > 0
        and all(type(layer) is nn.Linear and not any(getattr(layer, name) for name in hooks) for layer in (key, value))
        and not any("forward" in vars(module) for module in (attention, key, value))  # Accelerate's are there.
    )


def _forward(
    usual: Callable[..., Any],
    attend: Callable[..., Tensor],
    most: int,
    mask: str,
    outputs: Callable[[Tensor, dict[str, Any]], tuple[Any, ...]],
    /,
    hidden_states: Tensor,
    **arguments: Any,
) -> Any:
    """In place of an attention's forward. most: tokens for which `attend` is fewer operations than keys and values."""
    states, hidden = arguments.get("key_value_states"), arguments.get(mask)
    usable = hidden is None or isinstance(hidden, Tensor)
    if states is None or not usable or arguments.get("past_key_values") is not None or hidden_states.shape[1] > most:
        return usual(hidden_states, **arguments)
    return outputs(attend(hidden_states, states, hidden), arguments)


def _attend(
    layers: Sequence[Any],
    heads: int,
    scaling: float,
    /,
    tokens: Tensor,
    states: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """What tokens [B, N, d] add after attending to states [B, T, d] (mask: [B or 1, 1, N or 1, T], added, or bool).
    layers: of queries, keys, values and the output.

    A head's score q . (K s + k) is (K'q) . s + q . k, of which the last is the same for all states and falls out of the
    softmax; and the mean of its values is V times the mean of the states, plus v, as weights add up to 1. So a head multiplies
    the states by N vectors twice, instead of by the rows of K and V.
    """
    query, key, value, output = layers
    rows, count, _ = tokens.shape
    queries = (query(tokens) * scaling).view(rows, count, heads, -1)
    taken = torch.einsum("bnhc,hcd->bhnd", queries, key.weight.view(heads, queries.shape[-1], -1))
    scores = (taken.flatten(1, 2) @ states.transpose(1, 2)).view(rows, heads, count, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1)
    mean = (weights.flatten(1, 2) @ states).view(rows, heads, count, -1)
    values = torch.einsum("bhnd,hcd->bnhc", mean, value.weight.view(heads, queries.shape[-1], -1)).flatten(2)
    found: Tensor = output(values if value.bias is None else values + value.bias)
    return found
