"""Words and characters as numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from secateur.support.errors import InputError

UNKNOWN, BOUNDARY = "<unk>", "<s>"


class Vocabulary:
    """Entries with their numbers, the most frequent first; what is not among them has the number of UNKNOWN, 0. BOUNDARY, 1, is
    where a sentence begins or ends. Raises InputError: entries that do not begin with these two, or one twice."""

    def __init__(self, entries: Sequence[str]) -> None:
        if list(entries[:2]) != [UNKNOWN, BOUNDARY]:
            raise InputError(f"vocabulary: expected {UNKNOWN} and {BOUNDARY} as the first entries, got {list(entries[:2])}")
        self.entries = list(entries)
        self._numbers = {entry: number for number, entry in enumerate(self.entries)}
        if len(self._numbers) < len(self.entries):
            twice = next(entry for entry, count in Counter(self.entries).items() if count > 1)
            raise InputError(f"vocabulary: expected each entry once, got {twice!r} more often")

    @classmethod
    def count(cls, entries: Iterable[str], *, at_least: int = 1, largest: int | None = None) -> Vocabulary:
        """The entries that come at_least that many times, `largest` in all at most, equally frequent ones by the alphabet."""
        counts = Counter(entries)
        for mark in (UNKNOWN, BOUNDARY):
            counts.pop(mark, None)
        ordered = sorted((entry for entry, count in counts.items() if count >= at_least), key=lambda e: (-counts[e], e))
        return cls([UNKNOWN, BOUNDARY, *ordered][:largest])

    def __len__(self) -> int:
        return len(self.entries)

    def numbers(self, entries: Iterable[str]) -> list[int]:
        """A mark within a text is not the mark itself, but an unknown entry."""
        return [number if (number := self._numbers.get(entry, 0)) > 1 else 0 for entry in entries]


def plain_form(word: str) -> str:
    """A word as the tagger's word embeddings know it, in small letters with 0 for each digit; its characters tell the rest."""
    return re.sub(r"\d", "0", word.lower())
