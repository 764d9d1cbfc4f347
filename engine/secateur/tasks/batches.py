"""Items and padded batches of like length."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100


@dataclass(frozen=True)
class Item:
    """One example, tokenised. row: its position among the examples given; target: piece ids, a class, or word classes."""

    row: int
    input_ids: list[int]
    target: list[int]

    @property
    def tokens(self) -> int:
        """How many of the model's tokens the input has."""
        return len(self.input_ids)

    @property
    def length(self) -> int:
        return max(self.tokens, 1)

    @property
    def content(self) -> bytes:
        """All that tells one item from another."""
        return array("q", [self.row, len(self.target), *self.target, *self.input_ids]).tobytes()


@dataclass(frozen=True)
class Batch:
    """Padded items: `inputs` are the model's keyword arguments, `labels` [B, T] the target ids, -100 where none."""

    inputs: dict[str, Tensor]
    labels: Tensor
    rows: list[int]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of a padded input."""
        return self.inputs["input_ids"].shape[1]

    def real(self, *, target: bool) -> Tensor:
        """Which tokens [B, T] are no padding: of the target, over which a decoder runs that has an encoder, or of the input."""
        return self.labels != IGNORED if target else self.inputs["attention_mask"].bool()

    def take(self, rows: Tensor) -> Batch:
        """The batch of the given rows (int64 [n]), which may repeat."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels[rows], rows=[self.rows[row] for row in rows.tolist()])


def model_device(model: nn.Module) -> torch.device:
    """The device that a model's inputs belong on: the first one. Offloaded weights are on none, and have their inputs moved."""
    places = (parameter.device for parameter in model.parameters())
    return next((place for place in places if place.type != "meta"), torch.device("cpu"))


def buckets(items: Sequence[Item], max_tokens: int, padded: Callable[[int], int] = lambda length: length) -> list[list[Item]]:
    """Items of like length together, longest first, each bucket within max_tokens when padded. padded: the length that a
    bucket's longest item gets."""
    found: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (-item.length, item.row)):
        if found and (len(found[-1]) + 1) * padded(found[-1][0].length) <= max_tokens:
            found[-1].append(item)
        else:
            found.append([item])
    return found


def in_order(parts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """What batches gave, at their rows' places: [examples, ...], on the CPU."""
    return torch.cat(list(parts)).cpu()[torch.tensor(rows).argsort()]


def pad(sequences: Sequence[Sequence[int]], value: int, device: torch.device, length: int = 1) -> Tensor:
    """Right-padded int64 ids [B, longest], of at least that length."""
    longest = max(length, max(map(len, sequences)))
    rows = [[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64, device=device)
