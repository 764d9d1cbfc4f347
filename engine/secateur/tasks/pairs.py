"""Pairs of texts as one input: encoded by the tokenizer, and cut as transformers cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.tasks.long_texts import shortened


@dataclass(frozen=True)
class EncodedPair:
    """A pair of texts, encoded and cut.

    Attributes:
        ids: The ids.
        segments: The number of the text, 0 or 1, that each id belongs to; empty if the tokenizer does not tell.
        tokens: The number of ids before the cut. Of very long texts it is too low.
        exact: Whether `tokens` is the exact number.
    """

    ids: list[int]
    segments: list[int]
    tokens: int
    exact: bool


def is_pair(value: Any) -> bool:
    """Return whether a value is a list or a tuple of two, as pairs of texts are given."""
    return isinstance(value, (list, tuple)) and len(value) == 2


def marks_of_pairs(tokenizer: Any) -> list[int]:
    """Return the marks that the tokenizer adds to a pair."""
    marks: list[int] = tokenizer([""], [""])["input_ids"][0]  # Of ("", "") without lists the second text would be ignored.
    return marks


def encode_pairs(tokenizer: Any, pairs: Sequence[Sequence[str]], room: int | None) -> list[EncodedPair]:
    """Encode pairs, and cut the longer text of a pair first, as `tokenizer(first, second, truncation=True)` does.

    The tokenizer itself would make all overlapping pieces of both texts, whose number is the product of two numbers.

    Args:
        tokenizer: The tokenizer.
        pairs: The pairs.
        room: The most ids of a pair; None for any number.

    Raises:
        ValueError: The room is too small for the tokenizer's marks.
    """
    if not pairs:
        return []
    short = [list(pair) if room is None else shortened(tokenizer, pair, room) for pair in pairs]
    encoded = tokenizer([first for first, _ in short], [second for _, second in short], truncation=False, verbose=False)
    segments = encoded.get("token_type_ids") or [[]] * len(pairs)
    cut = []
    for row, (ids, of_row) in enumerate(zip(encoded["input_ids"], segments, strict=True)):
        exact = short[row] == list(pairs[row])
        if room is None or len(ids) <= room:
            cut.append(EncodedPair(ids, of_row, len(ids), exact))
        elif encoded.is_fast:
            kept = _kept(encoded.sequence_ids(row), room, last=tokenizer.truncation_side == "left")
            cut.append(EncodedPair([ids[k] for k in kept], [of_row[k] for k in kept] if of_row else [], len(ids), exact))
        else:  # Tokenizers in Python make no overlapping pieces.
            one = tokenizer(*([text] for text in short[row]), truncation=True, max_length=room)
            cut.append(EncodedPair(one["input_ids"][0], (one.get("token_type_ids") or [[]])[0], len(ids), exact))
    return cut


def _kept(texts: Sequence[int | None], room: int, *, last: bool) -> list[int]:
    """Return the positions of a pair's ids that stay.

    Args:
        texts: The text, 0 or 1, of each id; None for marks.
        room: The number of ids that stay.
        last: Whether the last ids of each text stay, instead of the first ones.
    """
    counts = [texts.count(0), texts.count(1)]
    room -= len(texts) - sum(counts)
    if room <= 0:
        raise ValueError(f"expected room for more ids than its {len(texts) - sum(counts)} marks of a pair")
    longer, (fewer, more) = int(counts[1] >= counts[0]), sorted(counts)
    stay = [0, 0]
    # Half of the room for each of the texts; the longer one gets what the shorter one leaves, and an odd id.
    stay[1 - longer] = min(fewer, room // 2)
    stay[longer] = min(more, room - stay[1 - longer])
    places = ([k for k, text in enumerate(texts) if text == number] for number in (0, 1))
    parts = (of_text[len(of_text) - n :] if last else of_text[:n] for of_text, n in zip(places, stay, strict=True))
    return sorted([*(k for k, text in enumerate(texts) if text is None), *(k for part in parts for k in part)])
