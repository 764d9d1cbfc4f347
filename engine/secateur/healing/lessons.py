"""Lessons: examples with what the teacher says of them, which a pruned model shall learn to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.measuring.divergence import divergence_of
from secateur.model.blocks import Block, blocks
from secateur.model.hooks import states_of
from secateur.recovery.targets import HELD
from secateur.tasks import Batch, Item, Task
from secateur.tasks.batches import IGNORED, buckets, model_device

Pairs = Sequence[tuple[Block, Block]]  # Blocks of the pruned model, each with the teacher's.


class Lessons:
    """Items of examples with the teacher's logits at their target positions, and its states behind some blocks.

    The teacher runs over all items once, in the same batches whatever the training does, so that a resumed training sees the
    same numbers. Where its outputs take more than 2 GiB, it runs anew for each batch.

    Args:
        teacher: The teacher. It must be `undisturbed` from here on.
        task: The task.
        items: The items.
        pairs: The blocks whose states count; none for the logits alone.
        max_tokens: The most padded input tokens of a batch in which the models run without training.
    """

    def __init__(
        self, teacher: nn.Module, task: Task, items: Sequence[Item], pairs: Pairs = (), max_tokens: int = 4096
    ) -> None:
        self.teacher, self.task, self.items, self.pairs = teacher, task, items, pairs
        self._device = model_device(teacher)
        self._over_target = task.decodes_target and any(block.stack == "encoder" for block in blocks(teacher).values())
        numbers = {id(item): number for number, item in enumerate(items)}
        self._buckets = [[numbers[id(item)] for item in bucket] for bucket in buckets(items, max_tokens)]
        self._held: list[list[Tensor]] | None = None
        self._hold()

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the items of some numbers as one padded batch."""
        return self.task.collate([self.items[number] for number in numbers], self._device)

    def loss(self, model: nn.Module, numbers: Sequence[int], hidden_weight: float) -> Tensor:
        """Return the loss [] of a pruned model on some items.

        It is the Kullback-Leibler divergence of its predictions from the teacher's in nats for each item, plus `hidden_weight`
        times the mean over blocks of the squared error of its states, relative to the teacher's.
        """
        batch = self.batch(numbers)
        dense, *targets = self._taught(numbers, batch)
        logits, *states = self._outputs(model, batch, [block for block, _ in self.pairs])
        loss = divergence_of(dense.float(), logits.float()).sum() / len(numbers)
        for state, target in zip(states, targets, strict=True):
            error = (state.float() - target.float()).square().sum() / target.float().square().sum()
            loss = loss + hidden_weight / len(targets) * error
        return loss

    def divergence(self, model: nn.Module, *, trained: bool = False) -> float:
        """Return the divergence of a model's predictions from the teacher's: nats for each item, summed in float64.

        Args:
            model: The model.
            trained: Whether the model comes out of a training, which may have destroyed it. The divergence is then infinite.

        Raises:
            InputError: Logits are NaN or inf, and the model is not `trained`.
        """
        total = 0.0
        with torch.inference_mode():
            for numbers in self._buckets:
                batch = self.batch(numbers)
                run = self.task.logits if trained else partial(self.task.finite, run=self.task.logits)
                logits = run(model, batch)[batch.labels != IGNORED]
                total += float(divergence_of(self._taught(numbers, batch)[0].double(), logits.double()).sum())
        return total / len(self.items) if math.isfinite(total) else math.inf

    def real(self, batch: Batch, block: Block) -> Tensor:
        """Return which tokens [B, T] of a block's states are no padding."""
        return batch.real(target=block.stack == "decoder" and self._over_target)

    def _taught(self, numbers: Sequence[int], batch: Batch) -> list[Tensor]:
        """Return the teacher's logits and states of a batch, as `_outputs` does."""
        if self._held is None:
            with torch.no_grad():
                return self._outputs(self.teacher, batch, [dense for _, dense in self.pairs])
        return [torch.cat(parts) for parts in zip(*(self._held[number] for number in numbers), strict=True)]

    def _outputs(self, model: nn.Module, batch: Batch, of: Sequence[Block]) -> list[Tensor]:
        """Return a model's logits and its states behind some blocks.

        Returns:
            Logits [target positions, classes] and, for each block, states [tokens, channels], row by row of the batch.
        """
        states: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for block in of:

                def keep(module: nn.Module, arguments: Any, output: Any, path: str = block.path) -> None:
                    states[path] = states_of(output)

                stack.callback(model.get_submodule(block.path).register_forward_hook(keep).remove)
            logits = self.task.logits(model, batch)
        return [logits[batch.labels != IGNORED], *(states[block.path][self.real(batch, block)] for block in of)]

    def _hold(self) -> None:
        """Run the teacher over all items, unless its outputs are too large to hold."""
        held: list[list[Tensor]] = [[] for _ in self.items]
        size = 0
        for numbers in self._buckets:
            batch = self.batch(numbers)
            taught = self._taught(numbers, batch)
            size += sum(tensor.nbytes for tensor in taught)
            if size > HELD:
                return
            counted = [batch.labels != IGNORED, *(self.real(batch, dense) for _, dense in self.pairs)]
            lengths = [real.sum(1).tolist() for real in counted]
            for tensor, of_items in zip(taught, lengths, strict=True):
                for number, part in zip(numbers, torch.split(tensor, of_items), strict=True):
                    held[number].append(part.clone())
        self._held = held
