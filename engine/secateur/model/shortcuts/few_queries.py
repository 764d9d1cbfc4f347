"""Attention of a few tokens to many: queries are taken to where keys come from, so that no key and no value is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.branches import Attention, Branch, attentions
from secateur.model.shortcuts.base import of_class, untouched

Outputs = Callable[[Tensor, dict[str, Any]], tuple[Any, ...]]


def _without_weights(output: Tensor, arguments: dict[str, Any]) -> tuple[Any, ...]:
    return output, None


@contextmanager
def few_queries(
    model: nn.Module, branches: Iterable[Branch], *, mask: str = "attention_mask", outputs: Outputs = _without_weights
) -> Iterator[None]:
    """Within it the model's cross-attentions attend as `_attend` does, where that is fewer operations, with the same outputs up
    to rounding. Keys and values are a seventh of FLAN-T5 base's products of an input with weights.

    mask: the name of the argument of the module's forward that holds it. outputs: what that forward returns, of its output and
    its arguments. Modules for which `makes_keys` does not hold stay as they are.
    """
    with ExitStack() as undo:
        for branch in attentions(branches):
            if branch.kind == "cross_attention" and makes_keys(model, branch):
                undo.enter_context(of_class(model.get_submodule(branch.path), attending(model, branch, mask, outputs)))
        yield


def makes_keys(model: nn.Module, branch: Attention) -> bool:
    """Whether an attention can attend by `_attend`: it has heads, which do not share keys, and nobody hooked or replaced the
    layers that would not be called."""
    layers = (model.get_submodule(path) for path in (branch.key, branch.value))
    plain = all(type(layer) is nn.Linear and untouched(layer) for layer in layers)
    return branch.heads == branch.groups > 0 and plain and "forward" not in vars(model.get_submodule(branch.path))


def attending(
    model: nn.Module, branch: Attention, mask: str = "attention_mask", outputs: Outputs = _without_weights
) -> type[Any]:
    """The class of an attention that `makes_keys`, but that few tokens attend to `key_value_states` as `_attend` does: up to
    half of a head's channels, for which it is at most half of the operations for each state (what it does to the tokens
    beforehand counts where inputs are as short as they). mask, outputs: as in `few_queries`."""
    names = [path.removeprefix(f"{branch.path}.") for path in (branch.query, branch.key, branch.value, branch.output)]
    inside = names if branch.output.startswith(f"{branch.path}.") else names[:3]
    usual: Any = type(model.get_submodule(branch.path))
    return _attending(usual, tuple(inside), branch.head_dim, mask, outputs)


@cache  # The same one each time: what was compiled with it holds.
def _attending(usual: Any, names: tuple[str, ...], head_dim: int, mask: str, outputs: Outputs) -> type[Any]:
    _, _, *order = signature(usual.forward).parameters  # After self and the tokens.

    def forward(self: Any, hidden_states: Tensor, *positional: Any, **named: Any) -> Any:
        arguments = {**dict(zip(order, positional, strict=False)), **named}
        states, hidden = arguments.get("key_value_states"), arguments.get(mask)
        understood = arguments.get("past_key_values") is None and (hidden is None or isinstance(hidden, Tensor))
        if states is None or not understood or 2 * hidden_states.shape[1] > head_dim:
            return usual.forward(self, hidden_states, **arguments)
        layers = [getattr(self, name) for name in names]
        scaling = getattr(self, "scaling", 1.0)  # T5 has none, and older releases of it do not say so.
        return outputs(_attend(layers, head_dim, scaling, hidden_states, states, hidden), arguments)

    return type(usual.__name__, (usual,), {"forward": forward})


def _attend(
    layers: Sequence[Any], head_dim: int, scaling: float, tokens: Tensor, states: Tensor, mask: Tensor | None
) -> Tensor:
    """What tokens [B, N, d] add after attending to states [B, T, d] (mask: [B or 1, 1, N or 1, T], added, or bool).
    layers: of queries, keys and values, and of the output, if it is theirs to make.

    A head's score q . (K s + k) is (K'q) . s + q . k, of which the last is the same for all states and falls out of the
    softmax; and the mean of its values is V times the mean of the states, plus v, as weights add up to 1. So a head multiplies
    the states by N vectors twice, instead of by the rows of K and V.
    """
    query, key, value, *output = layers
    rows, count, _ = tokens.shape
    queries = (query(tokens) * scaling).view(rows, count, -1, head_dim)
    heads = queries.shape[2]
    taken = torch.einsum("bnhc,hcd->bhnd", queries, key.weight.view(heads, head_dim, -1))
    scores = (taken.flatten(1, 2) @ states.transpose(1, 2)).view(rows, heads, count, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1)
    mean = (weights.flatten(1, 2) @ states).view(rows, heads, count, -1)
    values = torch.einsum("bhnd,hcd->bnhc", mean, value.weight.view(heads, head_dim, -1)).flatten(2)
    found: Tensor = values if value.bias is None else values + value.bias
    for layer in output:
        found = layer(found)
    return found
