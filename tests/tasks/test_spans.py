"""The words of texts, and the spans that tags make."""

from __future__ import annotations

import itertools
import random

import pytest
from seqeval.metrics.sequence_labeling import get_entities

from secateur.tasks.spans import span_labels, spans_of, words_of, written_spans

WORDS = {
    "Angela Merkel met him.": ["Angela", "Merkel", "met", "him", "."],
    "Merkel's e-mail, don't!": ["Merkel", "'s", "e-mail", ",", "don't", "!"],
    "U.S. prices: 10,000.50 (AT&T) at 10:30": ["U.S", ".", "prices", ":", "10,000.50", "(", "AT&T", ")", "at", "10:30"],
    "red,green a:b x1,2": ["red", ",", "green", "a", ":", "b", "x1,2"],
    "Merkel\u2019s O\u2019Brien": ["Merkel", "\u2019s", "O\u2019Brien"],
    "\u5317\u4eac city \u30ab\u30ca": ["\u5317", "\u4eac", "city", "\u30ab", "\u30ca"],
    " \t\n": [],
    "...": [".", ".", "."],
    # Vowel signs, accents, joiners and soft hyphens are parts of words, as are variation selectors of symbols.
    "\u0939\u093f\u0928\u094d\u0926\u0940 x": ["\u0939\u093f\u0928\u094d\u0926\u0940", "x"],
    "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f": ["\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f"],
    "\u0645\u06cc\u200c\u062e Jose\u0301": ["\u0645\u06cc\u200c\u062e", "Jose\u0301"],
    "co\u00adop \u2764\ufe0f": ["co\u00adop", "\u2764\ufe0f"],
    "\u304b\u3099\u304f": ["\u304b\u3099", "\u304f"],
    # What cannot be seen is in no word.
    "\ufeffNew \u200fYork\0 a\u200bb\u200b \u202c": ["New", "York", "a", "b"],
    "_Merkel_ snake_case a__b": ["_", "Merkel", "_", "snake_case", "a", "_", "_", "b"],
    "na\u00efve \u041c\u043e\u0441\u043a\u0432\u0430": ["na\u00efve", "\u041c\u043e\u0441\u043a\u0432\u0430"],
}


@pytest.mark.parametrize("text", WORDS)
def test_words_of_a_text(text: str) -> None:
    assert [text[start:end] for start, end in words_of(text)] == WORDS[text]


def test_words_are_in_order_and_leave_only_spaces_out() -> None:
    random.seed(0)
    for _ in range(2000):
        text = "".join(random.choices("aB1 .,:'&-\u2019s\u5317(\n", k=random.randint(0, 30)))
        places = words_of(text)
        assert all(start < end for start, end in places)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
        assert "".join(text[start:end] for start, end in places) == "".join(text.split())


def test_entities_are_those_of_seqeval() -> None:
    random.seed(0)
    names = ["O", *(prefix + label for prefix in ("B-", "I-", "E-", "S-") for label in ("X", "Y"))]
    for _ in range(20_000):
        tags = random.choices(names, k=random.randint(1, 8))
        spans = [(span.label, span.first, span.end - 1) for span in spans_of(tags, entities=True)]
        assert spans == get_entities(tags), tags


def test_a_word_without_a_tag_ends_an_entity() -> None:
    assert spans_of(["B-X", None, "I-X"], entities=True) == [(0, 1, "X"), (2, 3, "X")]


def test_of_plain_tags_each_word_is_a_span() -> None:
    assert spans_of(["NOUN", "NOUN", "O", None, "VERB"], entities=False) == [(0, 1, "NOUN"), (1, 2, "NOUN"), (4, 5, "VERB")]
    assert span_labels(["O", "B-X", "I-X", "B-Y"]) == ["X", "Y"]
    assert span_labels(["NOUN", "B-X"]) == ["NOUN", "B-X"]


def test_a_spans_score_is_the_mean_of_its_words() -> None:
    spans = spans_of(["O", "B-X", "I-X"], entities=True)
    (span,) = written_spans("to New York", [(0, 2), (3, 6), (7, 11)], spans, [0.9, 0.5, 0.7])
    assert span == {"start": 3, "end": 11, "label": "X", "score": pytest.approx(0.6), "text": "New York"}
    (span,) = written_spans(["to", "New", "York"], [(0, 1), (1, 2), (2, 3)], spans, [0.9, 0.5, 0.7])
    assert (span["start"], span["end"], span["text"]) == (1, 3, "New York")


def test_a_long_text_of_marks_takes_linear_time() -> None:
    """Nested repetitions would try exponentially many splits of a run."""
    text = "a\u0301" * 100_000 + "-"
    assert words_of(text) == [(0, 200_000), (200_000, 200_001)]
