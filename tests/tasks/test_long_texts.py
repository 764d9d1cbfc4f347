"""Texts far longer than the model takes: they are encoded at their ends only, and cut to the same ids as the whole text."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from cases import CASES, CLASSES, TAGS, WORDS, piece_tokenizer, word_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from secateur import CausalLM, SequenceClassification
from secateur.corpus.sources import Row
from secateur.corpus.windows import windows
from secateur.tasks import TextTask, token
from secateur.tasks.token import TaggedItem, TokenClassification

LENGTH = 8


def trained(model: Any, trainer: Any, normalizer: Any = None, split: Any = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if split is not None:
        tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator([" ".join(random.Random(seed).choices(WORDS, k=50)) for seed in range(20)], trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def bpe(split: Any, normalizer: Any = None) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<pad>", "</s>", "<s>", "<unk>"], show_progress=False)
    return trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainer, normalizer, split)


def unigram() -> PreTrainedTokenizerFast:
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    return trained(models.Unigram(), trainer, split=pre_tokenizers.Metaspace())


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "words": lambda: word_tokenizer(start=True, end=False),
    "pieces": piece_tokenizer,
    "byte-level BPE": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "BPE that splits nowhere": lambda: bpe(None, normalizers.Replace(" ", "▁")),
    "unigram": unigram,
}


def long_texts() -> dict[str, str]:
    draw = random.Random(0)
    words = " ".join(draw.choices(WORDS, k=3000))
    return {
        "words": words,
        "lines": words.replace(" ", "\n"),
        "wide spaces": "   ".join(draw.choices(WORDS, k=3000)),
        "no spaces": words.replace(" ", ""),
        "a long word first": words.replace(" ", "")[:8000] + " " + words[:500],
        "a long word last": words[:500] + " " + words.replace(" ", "")[:8000],
        "spaces first": " " * 9000 + words[:200],
        "spaces last": words[:200] + " " * 9000,
        "one letter": "a" * 9000,
        "tabs": words.replace(" ", "\t"),
    }


TASKS: dict[str, Callable[[Any], TextTask]] = {
    "first ids": lambda tokenizer: SequenceClassification(tokenizer, labels=CLASSES, max_length=LENGTH),
    "last ids": lambda tokenizer: CausalLM(tokenizer, max_length=LENGTH),
}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_long_text_is_cut_to_the_ids_of_the_whole_text(name: str, kind: str) -> None:
    tokenizer = TOKENIZERS[name]()
    task = TASKS[kind](tokenizer)
    for what, text in long_texts().items():
        assert len(text) > 256 * LENGTH
        whole = tokenizer([text], truncation=False, verbose=False)["input_ids"][0]
        (ids,) = task.encode([text], LENGTH)
        assert task.cut(ids, LENGTH) == task.cut(whole, LENGTH), what
        assert (len(ids) > LENGTH) == (len(whole) > LENGTH), what


class Counting:
    """A tokenizer that counts the characters of the texts it encodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: list[Any], **options: Any) -> Any:
        """Encode texts, or words, or lists of words."""
        self.characters += sum(len(text) if isinstance(text, str) else len("".join(text)) for text in texts)
        return self.tokenizer(texts, **options)


def test_little_of_a_long_text_is_encoded() -> None:
    tokenizer = Counting(piece_tokenizer())
    task = SequenceClassification(tokenizer, labels=CLASSES, max_length=LENGTH)
    short = "the cat sat"
    long = "the cat sat on the tree " * 10_000
    first, second, third = task.encode([short, long, short], LENGTH)
    assert first == third == piece_tokenizer()(short)["input_ids"]
    assert task.cut(second, LENGTH) == task.cut(piece_tokenizer()(long)["input_ids"], LENGTH)
    assert tokenizer.characters < 2 * len(short) + 100 * LENGTH
    unbounded = SequenceClassification(piece_tokenizer(), labels=CLASSES)
    assert unbounded.max_length is None
    assert unbounded.encode([long]) == [piece_tokenizer()(long)["input_ids"]]


def long_words() -> dict[str, list[str]]:
    words = random.Random(0).choices([*WORDS, "plays", "singer", "catish"], k=3000)
    return {
        "words": words,
        "a long word first": ["cat" * 2000, *words],
        "a long word last": [*words, "cat" * 2000],
        "long words": ["a", "cat" * 200, "the"] * 300,
        "empty words": [word for word in words for word in (word, "", " ")],
        "few pieces": ["", " "] * 2000 + ["the", "cat"],
        "no pieces": [""] * 9000,
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["words", "pieces", "byte-level BPE"])
def test_many_words_are_cut_to_the_items_of_all_words(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = bpe(spaced) if name == "byte-level BPE" else TOKENIZERS[name]()
    tokenizer.truncation_side = side
    task, model = TokenClassification(tokenizer, max_length=LENGTH), CASES["bert-token"].model()
    for what, words in long_words().items():
        example = {"tokens": words, "tags": [TAGS[k % len(TAGS)] for k in range(len(words))]}
        (item,) = task.items(model, [example])
        with monkeypatch.context() as patch:
            patch.setattr(token, "enough_words", lambda tokenize, words, room, last: words)
            assert [item] == task.items(model, [example]), what


def test_few_of_many_words_are_encoded() -> None:
    tokenizer, model = Counting(piece_tokenizer()), CASES["bert-token"].model()
    task = TokenClassification(tokenizer, max_length=LENGTH)
    for words in (["the", "cat"] * 100_000, ["the cat " * 100_000, "sat"], ["a" * 2000] * 500):
        tokenizer.characters = 0
        (item,) = task.items(model, [{"tokens": words, "tags": ["O"] * len(words)}])
        assert isinstance(item, TaggedItem)
        assert item.cut
        assert len(item.input_ids) == LENGTH
        assert tokenizer.characters < 10_000 * LENGTH


def test_a_long_text_is_rejected_as_one_of_many_tokens() -> None:
    task = SequenceClassification(piece_tokenizer(), labels=CLASSES, max_length=LENGTH)
    rows = [Row("the cat sat on a tree " * count) for count in (1, 2, 10_000)]
    (window,) = windows([(rows, 1.0)], task, CASES["bert-sequence"].model(), 3, max_tokens=64, on_long="error")
    assert window.reasons == [
        None, "14 tokens, of which the model takes 8", "at least 16 tokens, of which the model takes 8",
    ]  # fmt: skip
