"""SharedPrefix: the tokens that all prompts of a task begin with, run once; every batch reads their keys and values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.model.families import takes_label_tree
from secateur.model.shortcuts.bfloat16_attention import MASKED
from secateur.support.compat import attention_implementation
from secateur.tasks.batches import Batch, model_device

if TYPE_CHECKING:
    from transformers import DynamicCache

# One of 9 tokens made labels 1.2 times as fast (SmolLM2-135M, 40 reviews). Shorter ones were not measured.
FEWEST = 8
# The prefixes that are held now, by the model's id and the prefix's ids, with the number of contexts that hold each.
# The contexts keep the model alive, so that its id stays its own.
_HELD: dict[tuple[int, tuple[int, ...]], SharedPrefix] = {}
_HOLDERS: dict[tuple[int, tuple[int, ...]], int] = {}
_LOCK = Lock()


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """What a model's layers hold of a prefix.

    Attributes:
        ids: Its ids.
        states: The cache with its keys and values, each [1, heads, tokens, channels]. Nobody appends to it.
        read_once: The class of a cache's layers that keep nothing. Made beforehand: torch.compile makes no classes.
    """

    ids: tuple[int, ...]
    states: DynamicCache
    read_once: type[Any]

    @property
    def length(self) -> int:
        """The number of tokens. It is a constant for torch.compile, as the length of a tuple is."""
        return len(self.ids)

    def for_rows(self, rows: int, *, grows: bool) -> DynamicCache:
        """Return a cache of so many rows that each hold the prefix. It shares the prefix's memory until it is appended to.

        Args:
            rows: The number of rows.
            grows: Whether the cache keeps what is appended. If not, one forward pass can read it, and no layer's states
                stay in memory after the layer has run.
        """
        cache = copy.copy(self.states)
        cache.layers = [self._for_rows(layer, rows, grows) for layer in cache.layers]
        return cache

    def _for_rows(self, layer: Any, rows: int, grows: bool) -> Any:
        """A layer's part of a cache of so many rows."""
        own = copy.copy(layer) if grows else self.read_once()
        own.is_initialized = layer.is_initialized
        if layer.is_initialized:
            own.dtype, own.device = layer.dtype, layer.device
            own.keys, own.values = (states.expand(rows, -1, self.length, -1) for states in (layer.keys, layer.values))
        return own


@functools.cache  # Always the same class, so that compiled code serves again.
def _read_once() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class ReadOnce(DynamicLayer):  # type: ignore[misc]
        """A layer of a cache that returns its keys and values with the new ones, and does not keep these."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                return key_states, value_states
            return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)

    return ReadOnce


def can_share(model: nn.Module) -> bool:
    """Return whether a model reads cached keys and values of a prefix exactly.

    Its family must read tokens after cached states by a given mask and given positions (`Family.cached_label_tree`), and its
    attention must take such a mask, which that of FlashAttention does not.
    """
    return takes_label_tree(model) and attention_implementation(model.config) in MASKED


@contextmanager
def held(model: nn.Module, ids: Sequence[int], *, at_once: bool = False) -> Iterator[None]:
    """A context in which `prefix_of` returns the prefix of these ids.

    The model's weights must not change inside. Several threads may be inside at once.

    Args:
        model: The model, in eval mode.
        ids: The prefix's ids; none hold nothing.
        at_once: Whether the model runs on them at the start. If not, it runs when the prefix is first asked for.
    """
    if not ids:
        yield
        return
    key = id(model), tuple(ids)
    with _LOCK:
        _HOLDERS[key] = _HOLDERS.get(key, 0) + 1
    try:
        if at_once:
            _run_once(model, key)
        yield
    finally:
        with _LOCK:
            _HOLDERS[key] -= 1
            if not _HOLDERS[key]:
                del _HOLDERS[key]
                _HELD.pop(key, None)


def prefix_of(model: nn.Module, ids: Sequence[int]) -> SharedPrefix | None:
    """Return the prefix of these ids for a model; None outside of a context `held` of both, or where gradients flow."""
    key = id(model), tuple(ids)
    if torch.is_grad_enabled() or key not in _HOLDERS:
        return None
    return _HELD[key] if key in _HELD else _run_once(model, key)


def _run_once(model: nn.Module, key: tuple[int, tuple[int, ...]]) -> SharedPrefix:
    """Run a model on a prefix, unless another thread has done it meanwhile, and hold the result."""
    with _LOCK:
        if key not in _HELD:
            _HELD[key] = _run(model, key[1])
        return _HELD[key]


@torch.inference_mode(False)  # The caller's next batch may run outside of inference mode.
@torch.no_grad()
def _run(model: nn.Module, ids: tuple[int, ...]) -> SharedPrefix:
    """Run a model on a prefix alone."""
    from transformers import DynamicCache

    # Without a config the cache keeps all keys and values, also those that a window will leave behind.
    row, cache = torch.tensor([ids], device=model_device(model)), DynamicCache()
    places = torch.arange(len(ids), device=row.device)[None]
    model(
        input_ids=row, attention_mask=torch.ones_like(row), position_ids=places, past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    return SharedPrefix(ids, cache, _read_once())


def common(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the ids that all sequences begin with."""
    shortest = min(sequences, key=len)
    same = [all(ids[k] == own for ids in sequences) for k, own in enumerate(shortest)]
    return list(shortest[: same.index(False) if False in same else len(same)])


def padded_on_the_left(batch: Batch) -> Batch:
    """Return a batch whose padding is before all tokens of a row, wherever it was."""
    mask = batch.inputs["attention_mask"]
    order = mask.argsort(dim=1, stable=True)  # [B, T]: the padding first, and the tokens in their order.
    return replace(batch, inputs={name: tensor.gather(1, order) for name, tensor in batch.inputs.items()})
