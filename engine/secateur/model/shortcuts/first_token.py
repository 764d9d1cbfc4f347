"""Encoders whose head reads the first token alone: the last block computes only that token, which attends to all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
    model: nn.Module,
    layers: str,
    branches: Iterable[Branch],
    readers: Mapping[str, str],
    needed: Collection[str] = (),
    *,
    norm: str | None = None,
) -> Iterator[None]:
    """A context in which the last block computes the first token's output alone.

    Logits are the same up to rounding. It saves a sixth of a 6-layer encoder's products. Models of other classes than the
    readers', and models with a hooked or replaced module, stay unchanged.

    Args:
        model: The model.
        layers: The name of the list of blocks.
        branches: The branches of the model.
        readers: By class of transformers whose logits depend on the first token of the encoder's output alone, the path of its
            module that picks the token ("" for the model itself).
        needed: As in `makes_keys`.
        norm: The name of a block's norm before its attention, if it has one.
    """
    with ExitStack() as undo:
        if _reads_first_token(model, readers):
            for module, kind in _changed(model, [path for _, path in blocks(model, layers)], branches, needed, norm):
                undo.enter_context(of_class(module, kind))
        yield


def _reads_first_token(model: nn.Module, readers: Mapping[str, str]) -> bool:
    reader = readers.get(_code(model).removesuffix(".forward"))
    return reader is not None and _code(model.get_submodule(reader)) != "" and all(map(untouched, model.modules()))


def _changed(
    model: nn.Module, layers: Sequence[str], branches: Iterable[Branch], needed: Collection[str], norm: str | None
) -> list[tuple[nn.Module, type[Any]]]:
    """Return the modules of the last block to change, each with its new class; none where the block cannot be changed."""
    attention = attentions(branches)[-1]
    block, attends = model.get_submodule(layers[-1]), model.get_submodule(attention.path)
    usual: Any = type(block)
    if attention.heads == 0:  # Nothing is attended to.
        return [(block, _for_first_token(usual, norm))]
    if getattr(attends, "is_causal", False) or attention.head_dim < 2 or not makes_keys(model, attention, needed):
        return []
    return [(attends, attending(model, attention)), (block, _for_first_token(usual, norm))]


def _code(module: nn.Module) -> str:
    """Return the name of a module's forward if transformers defines it, otherwise ""."""
    forward = type(module).forward
    return forward.__qualname__ if forward.__module__.startswith("transformers.") else ""


@cache  # Cached, so that torch.compile reuses the compiled code.
def _for_first_token(usual: Any, norm: str | None) -> type[Any]:
    """Return the class of a block, changed to compute the output [B, 1, d] of the first of its tokens [B, T, d]."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, *rest: Any, **named: Any) -> Any:
        understood = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4)
        if not understood or named.get("past_key_values") is not None:
            return usual.forward(self, hidden_states, attention_mask, *rest, **named)
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        states = hidden_states if norm is None else getattr(self, norm)(hidden_states)
        return usual.forward(self, hidden_states[:, :1], mask, *rest, key_value_states=states, **named)

    return type(usual.__name__, (usual,), {"forward": forward})
