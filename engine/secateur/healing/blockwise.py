"""Blockwise distillation: each block that lost units is trained alone, towards the dense states behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.healing.block_walk import BlockWalk
from secateur.healing.lessons import Lessons, Pairs
from secateur.model.blocks import Block, blocks
from secateur.model.hooks import states_of
from secateur.support.progress import Progress, counted
from secateur.tasks import Batch

_EPOCHS, _LEARNING_RATE = 3, 1e-3  # Passes over the examples for each block, and Adam's rate at their beginning.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class BlockFit:
    """The training of one block.

    Attributes:
        block: Its name in the dense model.
        before: The squared error of the states behind it on the held-out examples, relative to the dense states' squares.
        after: The same error after the training.
    """

    block: str
    before: float
    after: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def heal_blocks_(
    student: nn.Module,
    lessons: Lessons,
    held_out: Lessons,
    pairs: Pairs,
    *,
    batch_size: int,
    seed: int,
    over: Callable[[float], bool],
    progress: Progress | None = None,
) -> list[BlockFit]:
    """Train in place each block of a pruned model that has fewer weights than the teacher's, in the order of the forward pass.

    A block reads the pruned states in front of it, so it also gives back what earlier blocks and removed ones have lost. It
    keeps its weights where training does not lower the error on held-out examples. Gradients and the optimizer's state are in
    memory for one block at a time.

    Args:
        student: The pruned model, in eval mode, with trainable weights.
        lessons: The examples, with the teacher.
        held_out: The held-out examples, with the teacher.
        pairs: The blocks of the pruned model, each with the teacher's.
        batch_size: The items of a step.
        seed: The seed of the order of batches.
        over: Returns whether the time is over. Blocks that are not trained then stay as they are.
        progress: True for a progress bar, or a function of (blocks done, all blocks).

    Returns:
        The training of each block.
    """
    streams = [_Stream(student, of, batch_size) for of in (lessons, held_out)]
    fits = []
    for number, (block, dense) in enumerate(counted(progress, "healing blocks", pairs, len(pairs))):
        fitted, tested = (stream.reach(block, dense) for stream in streams)
        module = student.get_submodule(block.path)
        if _weights(module) < _weights(lessons.teacher.get_submodule(dense.path)) and not over(0.0):
            before = _error(module, tested)
            after = _train_(module, fitted, tested, seed + number, before)
            fits.append(BlockFit(dense.name, before, after))
        for stream in streams:
            stream.leave(block)
    return fits


@dataclass(frozen=True)
class _Part:
    """One batch at a block: how the block is called, the target states, and the mask of tokens that are no padding."""

    call: Call
    target: Tensor
    real: Tensor


class _Stream:
    """The pruned and the dense states of all batches, up to a block."""

    def __init__(self, student: nn.Module, lessons: Lessons, batch_size: int) -> None:
        order = sorted(range(len(lessons.items)), key=lambda number: -lessons.items[number].length)
        self._lessons = lessons
        self._batches: list[Batch] = [lessons.batch(order[k : k + batch_size]) for k in range(0, len(order), batch_size)]
        self._pruned = BlockWalk(student, lessons.task, self._batches)
        self._dense = BlockWalk(lessons.teacher, lessons.task, self._batches)
        self._left = list(blocks(lessons.teacher).values())

    def reach(self, block: Block, dense: Block) -> list[_Part]:
        """Return all batches at a block. Removed blocks of the teacher in front of it are run too."""
        parts = []
        while self._left[0] != dense:
            removed = self._left.pop(0)
            for k in range(len(self._batches)):
                self._dense.behind(k, removed)
        self._left.pop(0)
        for k, batch in enumerate(self._batches):
            target = self._dense.behind(k, dense)
            parts.append(_Part(self._pruned.call(k, block), target, self._lessons.real(batch, dense)))
        return parts

    def leave(self, block: Block) -> None:
        """Run a block, which is trained, on all batches."""
        for k in range(len(self._batches)):
            self._pruned.behind(k, block)


def _train_(
    module: nn.Module,
    fitted: Sequence[_Part],
    tested: Sequence[_Part],
    seed: int,
    before: float,
) -> float:
    """Train a block in place, and keep its best weights. Returns its error on the held-out examples then."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.numel()]
    optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS * len(fitted))
    least, best = before, [parameter.detach().clone() for parameter in parameters]
    for _ in range(_EPOCHS):
        for k in torch.randperm(len(fitted), generator=generator).tolist():
            optimizer.zero_grad()
            missed, size = _missed(module, fitted[k])
            if not missed.requires_grad:  # All branches of the block are empty, so it returns what it reads.
                return before
            torch.autograd.backward(missed / size)
            optimizer.step()
            scheduler.step()
        if (error := _error(module, tested)) < least:
            least, best = error, [parameter.detach().clone() for parameter in parameters]
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return least


def _missed(module: nn.Module, part: _Part) -> tuple[Tensor, Tensor]:
    """Return the squared error of the states behind a block, and the squares of the dense states, both [] in float32."""
    arguments, named = part.call
    states = states_of(module(*arguments, **named))[part.real].float()
    target = part.target[part.real].float()
    return (states - target).square().sum(), target.square().sum()


def _error(module: nn.Module, parts: Sequence[_Part]) -> float:
    """Return the squared error of the states behind a block on all batches, relative to the dense states' squares."""
    with torch.no_grad():
        sums = [_missed(module, part) for part in parts]
    return sum(float(missed) for missed, _ in sums) / sum(float(size) for _, size in sums)


def _weights(module: nn.Module) -> int:
    """Return the number of a block's weights."""
    return sum(parameter.numel() for parameter in module.parameters())
