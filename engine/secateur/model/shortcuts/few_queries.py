"""Attention of a few tokens to many, without keys and values: queries are projected into the space of the states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
    model: nn.Module,
    branches: Iterable[Branch],
    needed: Collection[str] = (),
    *,
    mask: str = "attention_mask",
    outputs: Outputs = _without_weights,
) -> Iterator[None]:
    """A context in which the model's cross-attentions attend as `_attend` does, where that needs fewer operations.

    Outputs are the same up to rounding. Keys and values are a seventh of FLAN-T5 base's products of an input with weights.
    Modules for which `makes_keys` does not hold stay unchanged.

    Args:
        model: The model.
        branches: Its branches.
        needed: As in `makes_keys`.
        mask: The name of the argument of the module's forward that holds the mask.
        outputs: Returns what that forward returns, from its output and its arguments.
    """
    with ExitStack() as undo:
        for branch in attentions(branches):
            if branch.kind == "cross_attention" and makes_keys(model, branch, needed):
                undo.enter_context(of_class(model.get_submodule(branch.path), attending(model, branch, mask, outputs)))
        yield


def makes_keys(model: nn.Module, branch: Attention, needed: Collection[str] = ()) -> bool:
    """Return whether an attention can attend by `_attend`.

    It can if it has heads, the heads do not share keys, and the layers that would not be called are neither hooked nor
    replaced, nor among the needed ones.

    Args:
        model: The model.
        branch: The attention.
        needed: The paths of the linear layers that must run.
    """
    if {branch.key, branch.value} & set(needed):
        return False
    layers = (model.get_submodule(path) for path in (branch.key, branch.value))
    plain = all(type(layer) is nn.Linear and untouched(layer) for layer in layers)
    return branch.heads == branch.groups > 0 and plain and "forward" not in vars(model.get_submodule(branch.path))


def attending(
    model: nn.Module, branch: Attention, mask: str = "attention_mask", outputs: Outputs = _without_weights
) -> type[Any]:
    """Return the class of an attention that `makes_keys`, changed so that few tokens attend as `_attend` does.

    Few are up to half of a head's channels. For these, `_attend` needs at most half of the operations for each state. (What it
    does to the tokens beforehand counts where inputs are as short as that.) Other calls run the usual forward. mask, outputs:
    as in `few_queries`.
    """
    names = [path.removeprefix(f"{branch.path}.") for path in (branch.query, branch.key, branch.value, branch.output)]
    inside = names if branch.output.startswith(f"{branch.path}.") else names[:3]
    usual: Any = type(model.get_submodule(branch.path))
    return _attending(usual, tuple(inside), branch.head_dim, mask, outputs)


@cache  # Cached, so that torch.compile reuses the compiled code.
def _attending(usual: Any, names: tuple[str, ...], head_dim: int, mask: str, outputs: Outputs) -> type[Any]:
    _, _, *order = signature(usual.forward).parameters  # After self and the tokens.

    def forward(self: Any, hidden_states: Tensor, *positional: Any, **named: Any) -> Any:
        arguments = {**dict(zip(order, positional, strict=False)), **named}
        states, hidden = arguments.get("key_value_states"), arguments.get(mask)
        understood = arguments.get("past_key_values") is None and (hidden is None or isinstance(hidden, Tensor))
        if states is None or not understood or 2 * hidden_states.shape[1] > head_dim:
            return usual.forward(self, hidden_states, **arguments)
        layers = [getattr(self, name) for name in names]
        scaling = getattr(self, "scaling", 1.0)  # T5 does not scale, and older releases have no attribute that says so.
        return outputs(_attend(layers, head_dim, scaling, hidden_states, states, hidden), arguments)

    return type(usual.__name__, (usual,), {"forward": forward})


def _attend(
    layers: Sequence[Any], head_dim: int, scaling: float, tokens: Tensor, states: Tensor, mask: Tensor | None
) -> Tensor:
    """Return the output of tokens [B, N, d] that attend to states [B, T, d].

    A head's score q . (K s + k) is (K'q) . s + q . k. The last term is the same for all states and cancels in the softmax. The
    mean of the head's values is V times the mean of the states, plus v, because attention weights sum to 1. So a head
    multiplies the states by N vectors twice, instead of by the rows of K and V.

    Args:
        layers: The layers of queries, keys and values, and the out-projection if the module itself applies it.
        head_dim: The number of channels of a head.
        scaling: The factor on the queries.
        tokens: [B, N, d].
        states: [B, T, d].
        mask: [B or 1, 1, N or 1, T], added to the scores, or bool.
    """
    query, key, value, *output = layers
    rows, count, _ = tokens.shape
    queries = (query(tokens) * scaling).view(rows, count, -1, head_dim)
    heads = queries.shape[2]
    projected = torch.einsum("bnhc,hcd->bhnd", queries, key.weight.view(heads, head_dim, -1))  # [B, heads, N, d]
    scores = (projected.flatten(1, 2) @ states.transpose(1, 2)).view(rows, heads, count, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1)
    mean = (weights.flatten(1, 2) @ states).view(rows, heads, count, -1)
    values = torch.einsum("bhnd,hcd->bnhc", mean, value.weight.view(heads, head_dim, -1)).flatten(2)
    attended: Tensor = values if value.bias is None else values + value.bias  # [B, N, heads * head_dim]
    for layer in output:
        attended = layer(attended)
    return attended
