"""Texts far longer than a model takes: their ends, with the ids of the whole texts, so that little of them is tokenised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# A text with more characters than this for each id that the model takes is encoded at its two ends only, which begin with so
# many characters for each id.
LONG, _END = 256, 16


def shortened(tokenizer: Any, texts: Sequence[str], room: int) -> list[str]:
    """Return the texts of one input, very long ones cut, for a tokenizer that then cuts the input to `room` ids.

    The tokenizer returns the same ids as for the whole texts. It cuts the longer text of a pair first, which stays the longer
    one. Of two very long texts the one with more characters counts as the longer one. If it has fewer ids, and an odd number of
    ids is left for the two, one of them has one id more than it would have, and the other one less.

    Args:
        tokenizer: The tokenizer. It cuts at the side that its `truncation_side` says.
        texts: A text or two.
        room: The most ids of the input.
    """
    last = getattr(tokenizer, "truncation_side", "right") == "left"
    parts, least = list(texts), room

    def tokenize(ends: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(ends, truncation=False, verbose=False)["input_ids"]
        return encoded

    if max(map(len, parts)) > LONG * room:
        for k in sorted(range(len(parts)), key=lambda k: len(parts[k])):
            end = end_of(tokenize, parts[k], least, last=last) if len(parts[k]) > LONG * room else None
            parts[k] = parts[k] if end is None else end[0]
            least = max(least, len(tokenize([parts[k]])[0]) + 1) if len(parts) > 1 else least
    return parts


def enough_words(
    tokenize: Callable[[list[list[str]]], list[list[int]]], words: list[str], room: int, *, last: bool
) -> list[str]:
    """Return the words of one input, of far too many only some, for a tokenizer that then cuts the input to `room` ids.

    The tokenizer returns the same ids as for all words. Of a very long word at the cut only a part is returned.

    Args:
        tokenize: Encodes inputs, each a list of words, uncut.
        words: The words.
        room: The most ids of the input.
        last: Whether the last ids stay, instead of the first ones.
    """
    size = _END * room
    if sum(map(len, words)) + len(words) <= LONG * room:
        return words
    while True:
        kept, characters = list[str](), 0
        for word in reversed(words) if last else words:
            long = len(word) > LONG * room
            end = end_of(lambda parts: tokenize([[part] for part in parts]), word, room, last=last) if long else None
            kept.append(word if end is None else end[0])
            characters += len(kept[-1]) + 1
            if characters > size:
                break
        kept = kept[::-1] if last else kept
        if len(kept) == len(words) or len(tokenize([kept])[0]) > room:
            return kept
        size *= 2


def ends_of(tokenize: Callable[[list[str]], list[list[int]]], text: str, room: int) -> list[int] | None:
    """Return the first and the last `room` ids of a long text; None if they take the whole text."""
    head, tail = (end_of(tokenize, text, room, last=last) for last in (False, True))
    return None if head is None or tail is None else head[1] + tail[1]


def end_of(
    tokenize: Callable[[list[str]], list[list[int]]], text: str, ids: int, *, last: bool
) -> tuple[str, list[int]] | None:
    """Return the beginning or the last part of a long text, and its first or last `ids` ids; None if it is the whole text.

    The part is cut at whitespace, and encoded at two lengths, which must give the same ids: no id depends on the cut.
    """
    size = _END * ids
    while 4 * size <= len(text):
        lengths = (size, 2 * size)
        if last:
            parts = [text[_space_after(text, len(text) - length) :] for length in lengths]
        else:
            parts = [text[: _space_before(text, length)] for length in lengths]
        encoded = tokenize(parts)
        kept = [of_part[-ids:] if last else of_part[:ids] for of_part in encoded]
        if min(map(len, encoded)) >= 2 * ids and kept[0] == kept[1]:
            return parts[0], kept[0]
        size *= 2
    return None


def _space_before(text: str, end: int) -> int:
    """Return the place of the last space in the second half of a text's first `end` characters; `end` if there is none."""
    place = max(text.rfind(space, end // 2, end) for space in " \n")
    return end if place < 0 else place


def _space_after(text: str, start: int) -> int:
    """Return the place of the first space in the first half of a text after `start`; `start` if there is none."""
    stop = (start + len(text)) // 2
    return min((place for space in " \n" if (place := text.find(space, start, stop)) >= 0), default=start)
