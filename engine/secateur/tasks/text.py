"""TextTask: tasks whose inputs are texts that a tokenizer encodes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.support.errors import InputError
from secateur.tasks.base import Task, texts
from secateur.tasks.batches import Batch, Item, pad

logger = logging.getLogger("secateur")

# A text of more characters for each id of max_length is encoded at its two ends only, which begin with so many for each id.
_LONG, _END = 256, 16


class TextTask(Task):
    """A task whose inputs are texts.

    Args:
        tokenizer: The model's tokenizer.
        labels: The candidate labels.
        max_length: The most pieces of an input; by default the tokenizer's own limit.
    """

    def __init__(self, tokenizer: Any, *, labels: Sequence[str] | None = None, max_length: int | None = None) -> None:
        super().__init__(tokenizer, labels=labels)
        limit = getattr(tokenizer, "model_max_length", None)
        self.max_length = max_length or (limit if limit is not None and limit < 100_000 else None)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.reader

    def encode(self, inputs: list[str]) -> list[list[int]]:
        """Return the ids of inputs, uncut.

        Of a text far longer than `max_length` they are only the first and the last `max_length` ids, as the ids between them
        are never used and take much memory.
        """
        far = _LONG * self.max_length if self.max_length is not None else sys.maxsize
        ends = {row: self._ends(text) for row, text in enumerate(inputs) if len(text) > far}
        whole = [text for row, text in enumerate(inputs) if ends.get(row) is None]
        encoded = iter(self._tokenize(whole) if whole else [])
        return [ends.get(row) or next(encoded) for row in range(len(inputs))]

    @property
    def room(self) -> int | None:
        """The most ids of an input that the model takes; None for any number."""
        return self.max_length

    def cut(self, ids: list[int]) -> list[int]:
        """Return at most `room` of an input's ids, always with the last: the end-of-sequence mark of most tokenizers."""
        return ids if self.room is None or len(ids) <= self.room else [*ids[: self.room - 1], ids[-1]]

    def input_items(self, model: nn.Module, examples: Sequence[Example]) -> list[Item]:
        """Return the examples' inputs, encoded and cut, as items without targets."""
        return [Item(row, ids, []) for row, ids in enumerate(self._encode_cut(examples))]

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Return items without targets as one batch, padded to `length` tokens at least."""
        return Batch(self._inputs(items, device, length), torch.empty(len(items), 0), [item.row for item in items])

    @classmethod
    def require_reader(cls, model: nn.Module, reader: Any) -> None:
        """Refuse a tokenizer with more pieces than the model's embedding has rows.

        More rows than pieces are fine: many embeddings are padded to a round number.

        Raises:
            InputError: The tokenizer has more pieces.
        """
        if not hasattr(reader, "__len__"):
            return  # A user's own tokenizer may not say how many pieces it has.
        try:
            rows, pieces = len(model.get_input_embeddings().weight), len(reader)  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return  # A user's own model class may not say where its embedding is.
        if pieces > rows:
            raise InputError(
                f"tokenizer: expected at most {rows} pieces, the rows of the model's embedding, got a tokenizer with {pieces}: "
                "does it belong to the model?"
            )

    def require_texts(self) -> TextTask:
        """Return the task, whose inputs are texts."""
        return self

    def _inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> dict[str, Tensor]:
        """Return the items' padded input ids and their padding mask, both [B, T].

        Without a padding piece the end mark pads; the mask hides it.
        """
        padding = self.tokenizer.pad_token_id
        sequences = [item.input_ids for item in items]
        ids = pad(sequences, self.tokenizer.eos_token_id if padding is None else padding, device, length)
        return {"input_ids": ids, "attention_mask": pad([[1] * len(sequence) for sequence in sequences], 0, device, length)}

    def _tokenize(self, inputs: list[str], **options: Any) -> list[list[int]]:
        encoded: list[list[int]] = self.tokenizer(inputs, truncation=False, verbose=False, **options)["input_ids"]
        return encoded

    def _ends(self, text: str) -> list[int] | None:
        """Return the first and the last `max_length` ids of a long text; None if they take the whole text.

        Both ends are cut at whitespace, and encoded at two lengths, which must give the same ids: no id depends on a cut.
        """
        room, size = self.max_length or 0, _END * (self.max_length or 0)
        while 4 * size <= len(text):
            heads = self._tokenize([text[: _space_before(text, length)] for length in (size, 2 * size)])
            tails = self._tokenize([text[_space_after(text, len(text) - length) :] for length in (size, 2 * size)])
            first, last = ([ids[:room] for ids in heads], [ids[-room:] for ids in tails])
            if min(map(len, heads + tails)) >= 2 * room and first[0] == first[1] and last[0] == last[1]:
                return first[0] + last[0]
            size *= 2
        return None

    def _encode_cut(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the examples' inputs, encoded and cut to `room`, with a warning if any is cut."""
        encoded = self.encode(texts(examples, "input"))
        too_long = 0 if self.room is None else sum(len(ids) > self.room for ids in encoded)
        if too_long:
            logger.warning("%d of %d inputs are longer than %d pieces and were cut", too_long, len(encoded), self.room)
        return [self.cut(ids) for ids in encoded]


def _space_before(text: str, end: int) -> int:
    """Return the place of the last space in the second half of a text's first `end` characters; `end` if there is none."""
    place = max(text.rfind(space, end // 2, end) for space in " \n")
    return end if place < 0 else place


def _space_after(text: str, start: int) -> int:
    """Return the place of the first space in the first half of a text after `start`; `start` if there is none."""
    stop = (start + len(text)) // 2
    return min((place for space in " \n" if (place := text.find(space, start, stop)) >= 0), default=start)
