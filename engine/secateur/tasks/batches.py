"""Items and padded batches of like length."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.support.errors import InputError
from secateur.support.fields import require_count

IGNORED = -100
# A batch reads the keys and values of so many times its padded tokens at most, where its items share their first tokens.
_READ = 8


@dataclass(frozen=True)
class Item:
    """One example, tokenised.

    Attributes:
        row: The position of the example among the given examples.
        input_ids: The ids of the input.
        target: The target: ids of pieces, one class, the classes of words, or for each label whether it is right (1 or 0).
            Empty for an input without a target.
        value: The target that is a number; None for other targets.
        pair: Whether the input is a pair of texts.
        segments: The number of the text, 0 or 1, that each token of a pair of texts belongs to; empty for one text.
        shared: The number of its first ids that the items of a task share and the model has run before.
    """

    row: int
    input_ids: list[int]
    target: list[int]
    value: float | None = field(default=None, kw_only=True)
    pair: bool = field(default=False, kw_only=True)
    segments: tuple[int, ...] = field(default=(), kw_only=True)
    shared: int = field(default=0, kw_only=True)

    @property
    def tokens(self) -> int:
        """The number of tokens of the input that the model runs on."""
        return len(self.input_ids) - self.shared

    @property
    def length(self) -> int:
        """The number of tokens that a batch reserves for the item: 1 at least."""
        return max(self.tokens, 1)

    @property
    def content(self) -> bytes:
        """All that tells one item from another, as bytes."""
        numbers = array("q", [self.row, len(self.target), *self.target, *self.input_ids, *self.segments])
        return numbers.tobytes() + (b"" if self.value is None else array("d", [self.value]).tobytes())


class UnreadableError(InputError):
    """An item of a batch cannot be read, because the file of its image is damaged.

    Args:
        row: The row of the item.
        reason: Why it cannot be read.
    """

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"examples, row {row + 1}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Encoded:
    """An input, encoded and cut to what the model takes.

    Attributes:
        ids: The ids; none if the tokenizer cannot encode the input.
        tokens: The number of ids before the cut. Of a very long input it may be too low.
        exact: Whether `tokens` is the exact number.
        reason: Why the tokenizer cannot encode the input, or the model cannot take it; None if both can.
        pair: Whether the input is a pair of texts.
        segments: As in `Item`.
        shared: As in `Item`.
    """

    ids: list[int]
    tokens: int
    exact: bool = True
    reason: str | None = None
    pair: bool = field(default=False, kw_only=True)
    segments: tuple[int, ...] = field(default=(), kw_only=True)
    shared: int = field(default=0, kw_only=True)

    def item(self, row: int) -> Item:
        """Return the input as the item of a row, without a target."""
        return Item(row, self.ids, [], pair=self.pair, segments=self.segments, shared=self.shared)


@dataclass(frozen=True)
class Batch:
    """Padded items.

    Attributes:
        inputs: The model's keyword arguments.
        labels: The target ids [B, T], -100 where there is none.
        rows: The positions of the examples.
        extra: Further values for the task's own use.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    rows: list[int]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """The number of tokens of a padded input."""
        return self.inputs["input_ids"].shape[1]

    def real(self, *, target: bool) -> Tensor:
        """Return which tokens [B, T] are no padding.

        Args:
            target: Whether to look at the tokens of the target, which a decoder with an encoder runs over (if the task's
                `decodes_target` says so), or of the input.
        """
        return self.labels != IGNORED if target else self.inputs["attention_mask"].bool()

    def take(self, rows: Tensor) -> Batch:
        """Return the batch of the given rows (int64 [n]), which may repeat."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels[rows], rows=[self.rows[row] for row in rows.tolist()])


def model_device(model: nn.Module) -> torch.device:
    """Return the device that a model's inputs belong on: that of its first parameter on a device.

    Offloaded weights are on no device. Accelerate moves their inputs.
    """
    places = (parameter.device for parameter in model.parameters())
    return next((place for place in places if place.type != "meta"), torch.device("cpu"))


def buckets(items: Sequence[Item], max_tokens: int, padded: Callable[[int], int] = lambda length: length) -> list[list[Item]]:
    """Return the items in buckets of similar length, longest first.

    Items with shared first tokens come before the others, in buckets of their own.

    Args:
        items: The items.
        max_tokens: The most tokens of a padded bucket; a bucket has one item at least. Together with the shared tokens, which
            are in memory though they are not run, it is eight times as many.
        padded: The padded length of a bucket whose longest item has the given length.
    """
    require_count("max_tokens", max_tokens)

    def joins(item: Item, bucket: list[Item]) -> bool:
        first, rows = bucket[0], len(bucket) + 1
        fits = rows * padded(first.length) <= max_tokens and rows * (first.shared + first.length) <= _READ * max_tokens
        return fits and item.shared == first.shared

    grouped: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (-item.shared, -item.length, item.row)):
        if grouped and joins(item, grouped[-1]):
            grouped[-1].append(item)
        else:
            grouped.append([item])
    return grouped


def in_order(parts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Return the results of batches in the order of the examples: [examples, ...], on the CPU."""
    return torch.cat(list(parts)).cpu()[torch.tensor(rows).argsort()]


def pad(sequences: Sequence[Sequence[int]], value: int, device: torch.device, length: int = 1) -> Tensor:
    """Return right-padded ids [B, longest] (int64), with `length` columns at least."""
    longest = max(length, max(map(len, sequences)))
    rows = [[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64, device=device)
