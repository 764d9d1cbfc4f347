"""Removed blocks: which blocks a model can lose as wholes, and a context in which they pass their input on unchanged."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.model.blocks import Block, blocks
from secateur.model.families import family_of
from secateur.model.sites import Stack, counted
from secateur.support.errors import InputError

DEEPEST = 0.5  # The share of all blocks that may go.


def fewest_blocks(stack: Stack, decoder: Sequence[int]) -> int:
    """Return how many blocks a stack must keep at least.

    It is one. An encoder keeps as many as its decoder, because transformers makes the decoder's cache by the encoder's number
    of layers.

    Args:
        stack: The stack.
        decoder: The numbers of the blocks that the decoder keeps; empty where there is no decoder.
    """
    return max(1, len(decoder)) if stack == "encoder" else 1


def staying(model: nn.Module, removed: Collection[str]) -> dict[Stack, list[int]]:
    """Return the numbers of the blocks that stay in a model, by stack.

    Args:
        model: The model.
        removed: The names of the removed blocks, such as "encoder.3".

    Raises:
        InputError: A block is unknown, or no config describes the model without these blocks.
    """
    of_model = blocks(model)
    for name in removed:
        if name not in of_model:
            raise InputError(f"removed_blocks: expected some of {', '.join(of_model)}, got {name!r}")
    kept = _staying(of_model.values(), removed)
    if removed and (reason := _why_not(model, kept)) is not None:
        raise InputError(f"removed_blocks: {reason}, got all but {', '.join(removed)}")
    return kept


def may_go(model: nn.Module, removed: Collection[str]) -> bool:
    """Return whether a config describes the model without these blocks, which it has."""
    return _why_not(model, _staying(blocks(model).values(), removed)) is None


def _staying(of_model: Collection[Block], removed: Collection[str]) -> dict[Stack, list[int]]:
    return {
        stack: [block.layer for block in of_model if block.stack == stack and block.name not in removed]
        for stack in dict.fromkeys(block.stack for block in of_model)
    }


def _why_not(model: nn.Module, kept: Mapping[Stack, Sequence[int]]) -> str | None:
    """Return what a model with these blocks alone lacks, as the words "expected ..."; None where a config describes it."""
    for stack, numbers in kept.items():
        needed = fewest_blocks(stack, kept.get("decoder", ()))
        if len(numbers) < needed:
            return f"expected {counted(needed, 'block')} of the {stack} at least"
    keep_blocks = family_of(model).keep_blocks
    if keep_blocks is None or not keep_blocks(copy.deepcopy(model.config), kept):
        return f"expected blocks that a config of {type(model).__name__} can say"
    return None


@contextmanager
def skipped(model: nn.Module, removed: Collection[str]) -> Iterator[None]:
    """A context in which blocks return their input in place of their output, so that the residual stream passes them by.

    Whatever else a block returns stays, such as the position bias that T5's first block computes for the others.

    Args:
        model: The model.
        removed: The names of the blocks.
    """
    of_model = blocks(model)
    handles: list[RemovableHandle] = []
    try:
        for name in removed:
            block = model.get_submodule(of_model[name].path)
            handles.append(block.register_forward_hook(_input_instead, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_instead(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """Return the output of a block with its input [B, T, channels] in the place of the states."""
    states: Tensor = arguments[0] if arguments else named[next(iter(signature(module.forward).parameters))]
    return states if isinstance(output, Tensor) else (states, *output[1:])
