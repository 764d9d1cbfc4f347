"""Spans: the words of a text, and the entities that the tags of words make."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

_APOSTROPHE = "['\u2019]"
# Chinese and Japanese have no spaces between words: each character is a word. Elsewhere a word is a run of letters and digits,
# joined by single marks inside it ("U.S", "10.5", "e-mail", "AT&T", "don't"). The ending 's and each other mark are words.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
# Soft hyphen, zero-width non-joiner and joiner, word joiner: they stand inside words.
_JOINERS = "\u00ad\u200c\u200d\u2060"
# Marks between numbers alone: "10,000" and "10:30" are words, "red,green" is not one.
_BETWEEN_DIGITS = re.compile(r"(?<!\d)[,:]|[,:](?!\d)")


@cache
def _word() -> re.Pattern[str]:
    """The pattern of a word, made at its first use.

    `re` counts combining marks (accents, vowel signs) as no part of a word, and has no class of them. Characters of control and
    format, such as zero-width spaces, are in no word: they cannot be seen, and most tokenizers drop them.
    """
    combining = f"[{_class('Mn', 'Mc', 'Me')}{_JOINERS}]*+"
    letters = rf"(?:[^\W_{_ALONE}]++{combining})++"  # Possessive, so that no text takes more than linear time.
    inside = rf"(?!{_APOSTROPHE}[sS]\b)(?:[-.,:&_]|{_APOSTROPHE}){letters}"
    mark = rf"[^\s{_class('Cc', 'Cf')}]{combining}"
    return re.compile(rf"[{_ALONE}]{combining}|{_APOSTROPHE}[sS]\b|{letters}(?:{inside})*|{mark}")


def _class(*categories: str) -> str:
    """The characters of some of Unicode's categories of combining, control and format characters, as ranges for `re`."""
    points = [*range(0x1F000), *range(0xE0000, 0xE0200)]  # None of them is elsewhere.
    found = [point for point in points if unicodedata.category(chr(point)) in categories]
    ends = [k for k in range(1, len(found) + 1) if k == len(found) or found[k] != found[k - 1] + 1]
    return "".join(f"\\U{found[a]:08x}-\\U{found[b - 1]:08x}" for a, b in itertools.pairwise([0, *ends]))


class Span(NamedTuple):
    """Consecutive words with one label.

    Attributes:
        first: The first word.
        end: The word after the last one.
        label: The label, without the tags' prefixes.
    """

    first: int
    end: int
    label: str


def words_of(text: str) -> list[tuple[int, int]]:
    """Return where the words of a text begin and end, in characters.

    A word is a run of letters and digits, with single marks inside it ("U.S", "e-mail", "10.5"). The ending 's, each other
    mark, and each character of Chinese and Japanese are words too. Combining marks and joiners belong to the character before
    them. Control characters and zero-width spaces are in no word.
    """
    places = list[tuple[int, int]]()
    for match in _word().finditer(text):
        start = match.start()
        for mark in _BETWEEN_DIGITS.finditer(text, start, match.end()) if match.end() - start > 1 else ():
            places += [(start, mark.start()), mark.span()]
            start = mark.end()
        places.append((start, match.end()))
    return places


def has_words(text: str) -> bool:
    """Return whether a text has any words."""
    return _word().search(text) is not None


def is_of_entities(names: Sequence[str]) -> bool:
    """Whether tags are BIO or BIOES: O, or a prefix B-, I-, E- or S- with a label."""
    return all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-") for name in names)


def span_labels(names: Sequence[str]) -> list[str]:
    """Return the labels that spans of words with these tags have, without repetitions."""
    labels = [name[2:] for name in names if name != "O"] if is_of_entities(names) else [name for name in names if name != "O"]
    return list(dict.fromkeys(labels))


def spans_of(tags: Sequence[str | None], *, entities: bool) -> list[Span]:
    """Return the spans that the tags of words make.

    Args:
        tags: The tag of each word; None for a word without one.
        entities: Whether tags are BIO or BIOES. Entities are then those that seqeval counts: one begins at B- or S-, or at
            another tag after O, after E- or S-, or after another label. If not, each word whose tag is not O is a span.
    """
    if not entities:
        return [Span(word, word + 1, tag) for word, tag in enumerate(tags) if tag not in (None, "O")]
    spans = list[Span]()
    open_since: int | None = None
    before, label = "O", ""
    for word, tag in enumerate([*tags, "O"]):
        prefix, of_tag = ("O", "") if tag in (None, "O") else (tag[0], tag[2:])
        goes_on = prefix in "IE" and before in "BI" and of_tag == label
        if open_since is not None and not goes_on:
            spans.append(Span(open_since, word, label))
            open_since = None
        if prefix != "O" and open_since is None:
            open_since = word
        before, label = prefix, of_tag
    return spans


def written_spans(
    value: Any, places: Sequence[tuple[int, int]], spans: Sequence[Span], scores: Sequence[float]
) -> list[dict[str, Any]]:
    """Return spans as they are written: start, end, label, score and text.

    Args:
        value: The input: a text, or a list of words.
        places: Where each word begins and ends in a text, in characters; in a list of words, its position and the next one.
        spans: The spans.
        scores: The probability of each word's tag. A span's score is their mean.
    """
    written = []
    for first, end, label in spans:
        start, stop = places[first][0], places[end - 1][1]
        covered = value[start:stop]
        text = covered if isinstance(value, str) else " ".join(covered)
        written.append(
            {"start": start, "end": stop, "label": label, "score": sum(scores[first:end]) / (end - first), "text": text}
        )
    return written
