"""Encoders whose head reads the first token alone: their last block runs for that token, which attends to all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from secateur.model.branches import Branch, attentions
from secateur.model.paths import blocks
from secateur.model.shortcuts.base import of_class, untouched
from secateur.model.shortcuts.few_queries import attending, makes_keys


@contextmanager
def first_token_alone(
    model: nn.Module, layers: str, branches: Iterable[Branch], readers: Mapping[str, str], norm: str | None = None
) -> Iterator[None]:
    """Within it the last block computes the first token's output, with the same logits up to rounding: a sixth of a 6-layer
    encoder's products falls away.

    layers: what the list of the blocks is called. readers: for each class of transformers whose logits depend on the first
    token of the encoder's output alone, the path of its module that picks it ("": the model itself). norm: the name of a
    block's norm before its attention, if it has one. Models stay as they are that are of no such class, or of which somebody
    hooked or replaced a module.
    """
    with ExitStack() as undo:
        if _reads_first_token(model, readers):
            for module, kind in _changed(model, [path for _, path in blocks(model, layers)], branches, norm):
                undo.enter_context(of_class(module, kind))
        yield


def _reads_first_token(model: nn.Module, readers: Mapping[str, str]) -> bool:
    reader = readers.get(_code(model).removesuffix(".forward"))
    return reader is not None and _code(model.get_submodule(reader)) != "" and all(map(untouched, model.modules()))


def _changed(
    model: nn.Module, layers: Sequence[str], branches: Iterable[Branch], norm: str | None
) -> list[tuple[nn.Module, type[Any]]]:
    """The modules of the last block that have another class meanwhile, and which; none where it cannot be."""
    attention = attentions(branches)[-1]
    block, attends = model.get_submodule(layers[-1]), model.get_submodule(attention.path)
    usual: Any = type(block)
    if attention.heads == 0:  # Nothing is attended to.
        return [(block, _for_first_token(usual, norm))]
    if getattr(attends, "is_causal", False) or attention.head_dim < 2 or not makes_keys(model, attention):
        return []
    return [(attends, attending(model, attention)), (block, _for_first_token(usual, norm))]


def _code(module: nn.Module) -> str:
    """The name of a module's forward, if it is of transformers."""
    forward = type(module).forward
    return forward.__qualname__ if forward.__module__.startswith("transformers.") else ""


@cache  # The same one each time: what was compiled with it holds.
def _for_first_token(usual: Any, norm: str | None) -> type[Any]:
    """The class of a block, but that it computes the output [B, 1, d] of the first of its tokens [B, T, d]."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, *rest: Any, **named: Any) -> Any:
        understood = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4)
        if not understood or named.get("past_key_values") is not None:
            return usual.forward(self, hidden_states, attention_mask, *rest, **named)
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        states = hidden_states if norm is None else getattr(self, norm)(hidden_states)
        return usual.forward(self, hidden_states[:, :1], mask, *rest, key_value_states=states, **named)

    return type(usual.__name__, (usual,), {"forward": forward})
