"""Vocabularies: numbers of words and characters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from secateur.support.errors import InputError

UNKNOWN, BOUNDARY = "<unk>", "<s>"


class Vocabulary:
    """Entries and their numbers, the most frequent entry first.

    Number 0 is UNKNOWN, which stands for all entries that are not in the vocabulary. Number 1 is BOUNDARY, which marks the
    beginning and the end of a sentence.

    Args:
        entries: The entries in the order of their numbers.

    Raises:
        InputError: The first two entries are not UNKNOWN and BOUNDARY, or an entry occurs twice.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        if list(entries[:2]) != [UNKNOWN, BOUNDARY]:
            raise InputError(f"vocabulary: expected {UNKNOWN} and {BOUNDARY} as the first entries, got {list(entries[:2])}")
        self.entries = list(entries)
        self._numbers = {entry: number for number, entry in enumerate(self.entries)}
        if len(self._numbers) < len(self.entries):
            twice = next(entry for entry, count in Counter(self.entries).items() if count > 1)
            raise InputError(f"vocabulary: expected every entry once, got {twice!r} more often")

    @classmethod
    def count(cls, entries: Iterable[str], *, at_least: int = 1, largest: int | None = None) -> Vocabulary:
        """Build a vocabulary by counting.

        Entries are ordered by falling frequency, equally frequent ones alphabetically.

        Args:
            entries: The entries of a text, as often as they occur.
            at_least: How often an entry must occur to get a number.
            largest: The largest size of the vocabulary, with UNKNOWN and BOUNDARY; None for no limit.

        Returns:
            The vocabulary.
        """
        counts = Counter(entries)
        for mark in (UNKNOWN, BOUNDARY):
            counts.pop(mark, None)
        frequent = (entry for entry, count in counts.items() if count >= at_least)
        ordered = sorted(frequent, key=lambda entry: (-counts[entry], entry))
        return cls([UNKNOWN, BOUNDARY, *ordered][:largest])

    def __len__(self) -> int:
        return len(self.entries)

    def numbers(self, entries: Iterable[str]) -> list[int]:
        """Return the number of each entry. UNKNOWN or BOUNDARY inside a text counts as an unknown entry, 0."""
        return [number if (number := self._numbers.get(entry, 0)) > 1 else 0 for entry in entries]


def plain_form(word: str) -> str:
    """Return the form of a word that has a word embedding: lower case, with 0 for every digit.

    The character features tell words with the same form apart.
    """
    return re.sub(r"\d", "0", word.lower())
