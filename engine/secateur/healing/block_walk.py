"""BlockWalk: a forward pass over many batches, block by block. The blocks may change after they are reached."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.blocks import Block, blocks
from secateur.model.hooks import replaced, returning, states_of
from secateur.model.sites import Stack
from secateur.tasks import Batch, Task

_CACHES = ("past_key_values", "past_key_value")  # A block must not add to a cache each time it runs.


class _Reached(Exception):
    """The forward pass has reached the block, and the rest of it is not needed."""


class BlockWalk:
    """A forward pass of batches through a model. Each batch holds what the last block of each stack returned.

    Args:
        model: The model.
        task: The task.
        batches: The batches. Blocks must be reached in their order, each by every batch.
    """

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> None:
        self._model, self._task, self._batches = model, task, batches
        self._order = list(blocks(model).values())
        self._last: list[dict[Stack, Any]] = [{} for _ in batches]

    def call(self, k: int, block: Block) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with which the forward pass of batch k calls a block."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def reached(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append((arguments, {name: None if name in _CACHES else value for name, value in named.items()}))
            raise _Reached

        before = self._order[: self._order.index(block)]
        # Only what the last block of a stack returns reaches what comes behind it.
        stored = {earlier.path: returning(self._last[k][earlier.stack]) for earlier in before}
        handle = self._model.get_submodule(block.path).register_forward_pre_hook(reached, with_kwargs=True)
        try:
            with replaced(self._model, stored), suppress(_Reached), torch.no_grad():
                self._task.logits(self._model, self._batches[k])
        finally:
            handle.remove()
        return seen[0]

    def behind(self, k: int, block: Block) -> Tensor:
        """Run a block on batch k for good, and return the states [B, T, channels] behind it."""
        arguments, named = self.call(k, block)
        with torch.no_grad():
            output = self._model.get_submodule(block.path)(*arguments, **named)
        self._last[k][block.stack] = output
        return states_of(output)
