"""Start and end marks that a tokenizer adds, and the words of a tagger."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from cases import CASES, TAGS, byte_level_tokenizer, piece_tokenizer, word_tokenizer
from tokenizers import normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import secateur
from secateur.tasks.token import TokenClassification

LLAMA = CASES["llama"]
TAGGER = CASES["bert-token"]
PROMPT = [{"input": "the cat"}]


def test_a_prompt_has_one_start_mark() -> None:
    task = secateur.CausalLM(word_tokenizer(start=True, end=False), labels=["yes", "no"])
    assert task.encode(["<s> the cat", "the cat", "the <s> cat"]) == [[2, 4, 6], [2, 4, 6], [2, 4, 2, 6]]
    # Without an added mark, two in the text are the user's.
    assert secateur.CausalLM(word_tokenizer(start=False, end=False)).encode(["<s> <s> the"]) == [[2, 2, 4]]
    texts = secateur.SequenceClassification(word_tokenizer(start=True, end=True))
    assert texts.encode(["<s> the cat"]) == texts.encode(["the cat"])


def test_no_end_mark_stands_between_prompt_and_label() -> None:
    plain, ended = (secateur.CausalLM(word_tokenizer(start=True, end=end), labels=["yes", "no"]) for end in (False, True))
    assert ended.encode(["the cat", "", "the cat </s>"]) == [[2, 4, 6], [2], [2, 4, 6, 1]]
    model = LLAMA.model()
    assert ended.probabilities(model, PROMPT, 64) == plain.probabilities(model, PROMPT, 64)
    assert ended.generate(model, PROMPT, 64, 4) == plain.generate(model, PROMPT, 64, 4)
    rows = [{"input": "the cat", "target": "yes"}, {"input": "a dog", "target": "no"}]
    assert ended.items(model, rows) == plain.items(model, rows)


def test_an_empty_prompt_keeps_the_start_mark_that_is_also_the_end_mark() -> None:
    tokenizer = word_tokenizer(start=True, end=False)
    tokenizer.eos_token = "<s>"
    assert secateur.CausalLM(tokenizer).encode(["", "the"]) == [[2], [2, 4]]


def test_words_that_are_cut_off_are_missed(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = TAGGER.model()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.eye(len(TAGS))[1])  # Every word is a B-PER.
    rows = [{"tokens": ["cat"] * 6, "tags": ["B-PER"] * 6}, {"tokens": ["dog"], "tags": ["B-PER"]}]
    whole = secateur.evaluate(model, TAGGER.task, rows)
    with caplog.at_level(logging.WARNING, logger="secateur"):
        cut = secateur.evaluate(model, TokenClassification(piece_tokenizer(), max_length=5), rows)
    assert [record.message for record in caplog.records] == ["1 of 2 inputs are longer than 5 pieces and were cut"]
    assert whole.value == 1.0
    # Three of six words are left beside [CLS] and [SEP]: 4 of 7 entities are found, all of them rightly.
    assert cut.value == pytest.approx(2 * (4 / 7) / (1 + 4 / 7))


def without_pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer for which the word "zero" has no piece."""
    tokenizer = piece_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("zero", "")
    return tokenizer


def test_words_without_pieces_count_as_outside_of_entities() -> None:
    model: Any = TAGGER.model()
    task = TokenClassification(without_pieces())
    row = {"tokens": ["cat", "zero", "dog"], "tags": ["O", "B-PER", "O"]}
    (item,) = task.items(model, [row])
    assert item.target == [-100, 0, 0, -100]
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.eye(len(TAGS))[0])  # Every word is O.
    assert secateur.evaluate(model, task, [row]).value == 0.0  # The entity is missed: without it, there is no entity at all.
    model.config.id2label = dict(enumerate(["NOUN", "VERB", "DET", "ADJ", "X"]))
    words = secateur.evaluate(model, task, [{**row, "tags": ["NOUN", "NOUN", "VERB"]}])
    assert (words.metric, words.value, words.examples) == ("word accuracy", 1 / 3, 3)


def test_tokenizers_that_do_not_tell_words_are_refused() -> None:
    with pytest.raises(secateur.InputError, match=r"tokenizer: expected a fast tokenizer, .* got ByT5Tokenizer"):
        TokenClassification(ByT5Tokenizer())
    with pytest.raises(secateur.InputError, match=r"keeps the space before a word, .*add_prefix_space=True"):
        TokenClassification(byte_level_tokenizer(add_prefix_space=False))
    task = TokenClassification(byte_level_tokenizer(add_prefix_space=True))
    (item,) = task.items(TAGGER.model(), [{"tokens": ["a", "b"], "tags": ["O", "O"]}])
    assert task.tokenizer.convert_ids_to_tokens(item.input_ids) == ["\u0120", "a", "\u0120", "b"]
