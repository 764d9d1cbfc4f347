"""Rows that a model or a tokenizer cannot take: too long for the positions, with end marks, or impossible to encode."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, CLASSES, LABELS, piece_tokenizer, word_tokenizer
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ConvBertConfig,
    ConvBertForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import secateur
from secateur.corpus import score
from secateur.model.positions import positions, table_positions

LONG = "cat " * 100
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def classifier(cls: Callable[..., nn.Module] = BertForSequenceClassification, kind: Any = BertConfig, **options: Any) -> Any:
    """Return a small classifier of 3 classes."""
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    return cls(kind(vocab_size=len(piece_tokenizer()), **{**SMALL, "pad_token_id": 0, **names, **options})).eval()


def bart_classifier() -> Any:
    """Return a small classifier with an encoder and a decoder, which reads texts at their end mark."""
    return classifier(
        BartForSequenceClassification, BartConfig, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=40, eos_token_id=1,
        bos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tokens"),
    # RoBERTa's first position is row pad_token_id + 1, BART's and OPT's tables have two rows more.
    [("bert-sequence", 40), ("roberta", 39), ("bart", 40), ("marian", 40), ("gpt2", 64), ("opt", 64), ("distilbert", 40)],
)
def test_a_table_of_positions_serves_so_many_tokens(name: str, tokens: int) -> None:
    """The model takes that many tokens, and not one more."""
    case: Any = CASES[name]
    model: Any = case.model()
    assert positions(model) == table_positions(model) == tokens
    decoder = {"decoder_input_ids": torch.tensor([[1]])} if case.kind == "encoder-decoder" else {}
    with torch.inference_mode():
        model(input_ids=torch.full((1, tokens), 5), **decoder)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, tokens + 1), 5), **decoder)


def test_models_without_a_table_tell_their_positions_or_none() -> None:
    assert (positions(CASES["llama"].model()), table_positions(CASES["llama"].model())) == (64, None)
    assert positions(CASES["t5-relu"].model()) is None
    assert positions(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        (classifier(max_position_embeddings=40), 40),
        (classifier(RobertaForSequenceClassification, RobertaConfig, max_position_embeddings=42, pad_token_id=1), 40),
    ],
    ids=["bert", "roberta"],
)
def test_texts_beyond_the_positions_are_cut(model: Any, tokens: int, caplog: pytest.LogCaptureFixture) -> None:
    for given in (None, 1000):
        task = secateur.SequenceClassification(piece_tokenizer(), max_length=given)
        rows = [{"input": LONG, "target": CLASSES[0]}, {"input": "a dog", "target": CLASSES[1]}]
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="secateur"):
            assert secateur.evaluate(model, task, rows).examples == 2
        assert [record.message for record in caplog.records] == [f"1 of 2 inputs are longer than {tokens} pieces and were cut"]
        assert [len(item.input_ids) for item in task.items(model, rows)] == [tokens, 4]
        assert secateur.attribute(model, task, rows).examples == 2
        (batch,) = score(model, task, [LONG, "a dog"], threads=1)
        assert batch["reason"].to_pylist() == [None, None]
        (batch,) = score(model, task, [LONG, "a dog"], threads=1, on_long="error")
        assert batch["reason"].to_pylist() == [f"102 tokens, of which the model takes {tokens}", None]


def test_words_beyond_the_positions_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["bert-token"]
    rows = [{"tokens": ["cat"] * 100, "tags": ["O"] * 100}]
    with caplog.at_level(logging.WARNING, logger="secateur"):
        (item,) = case.task.items(case.model(), rows)
    assert len(item.input_ids) == 40
    assert "1 of 1 inputs are longer than 40 pieces" in caplog.text


def test_a_max_length_may_exceed_positions_that_are_no_table() -> None:
    model: Any = LlamaForCausalLM(
        LlamaConfig(vocab_size=31, num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, **SMALL)
    )
    tokenizer = word_tokenizer(start=True, end=False)
    assert secateur.CausalLM(tokenizer, labels=LABELS).room(model) == 13
    assert secateur.CausalLM(tokenizer, labels=LABELS, max_length=50).room(model) == 47


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_a_prompt_and_its_label_fit_the_positions(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, task = CASES[name].model(), secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS)
    rows = [{"input": LONG, "target": "maybe so then"}, {"input": "a dog", "target": "yes"}]
    with caplog.at_level(logging.WARNING, logger="secateur"):
        assert [len(item.input_ids) for item in task.items(model, rows)] == [64, 4]
        assert secateur.evaluate(model, task, rows).examples == 2
    assert [record.message for record in caplog.records] == [
        "1 of 2 inputs are longer than 64 pieces and were cut", "1 of 2 inputs are longer than 61 pieces and were cut"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_generation_has_room_for_its_output(name: str) -> None:
    model, task = CASES[name].model(), secateur.CausalLM(word_tokenizer(start=True, end=False))
    (long,) = task.generate(model, [{"input": LONG}], 4096, 5)
    # The same as after the last 59 of the prompt's pieces: 64 positions less 5 of the output.
    (short,) = secateur.CausalLM(word_tokenizer(start=False, end=False)).generate(model, [{"input": "cat " * 59}], 4096, 5)
    assert long == short
    with pytest.raises(secateur.InputError, match="longest: expected under 64 pieces"):
        task.generate(model, [{"input": "a"}], 4096, 64)


def test_an_output_beyond_positions_that_are_no_table_keeps_its_prompt() -> None:
    model, task = CASES["llama"].model(), secateur.CausalLM(word_tokenizer(start=True, end=False))
    (answer,) = task.generate(model, [{"input": "the cat sat"}], 4096, 64)
    (shorter,) = task.generate(model, [{"input": "the cat sat"}], 4096, 8)
    assert answer.startswith(shorter)


def test_a_target_beyond_the_decoders_positions_is_refused() -> None:
    model, tokenizer = CASES["bart"].model(), word_tokenizer(start=False, end=True)
    rows = [{"input": "a", "target": "yes"}, {"input": "a", "target": LONG}]
    with pytest.raises(secateur.InputError, match="row 2: expected at most 40 pieces, the decoder's positions"):
        secateur.attribute(model, secateur.TextToText(tokenizer), rows)
    with pytest.raises(secateur.InputError, match="labels: expected at most 40 pieces"):
        secateur.TextToText(tokenizer, labels=["yes", LONG]).ranked(model, [{"input": "a"}], 100)
    with pytest.raises(secateur.InputError, match="longest: expected at most the decoder's 40 positions"):
        secateur.TextToText(tokenizer).generate(model, [{"input": "a"}], 100, 41)


def test_a_text_with_an_end_mark_is_rejected_where_the_model_looks_for_it() -> None:
    model, task = bart_classifier(), secateur.SequenceClassification(word_tokenizer(start=True, end=True))
    documents = ["a cat", "a </s> cat", "the dog " * 40]
    (batch,) = score(model, task, documents, threads=1)
    reason = "2 end marks, at the last of which BartForSequenceClassification reads a text; expected one"
    assert batch["reason"].to_pylist() == [None, reason, None]
    (alone,) = score(model, task, documents[:1], threads=1)
    assert batch.slice(0, 1)["label"].to_pylist() == alone["label"].to_pylist()
    rows = [{"input": text, "target": CLASSES[k % 2]} for k, text in enumerate(documents)]
    with pytest.raises(secateur.InputError, match="row 2"):
        secateur.evaluate(model, task, rows)


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        (FNetForSequenceClassification, FNetConfig),
        (ConvBertForSequenceClassification, ConvBertConfig),
        (MobileBertForSequenceClassification, MobileBertConfig),
        (XLNetForSequenceClassification, XLNetConfig),
    ],
)
def test_models_that_read_padding_are_refused(cls: Callable[..., nn.Module], kind: Any) -> None:
    """Their outputs for one text depend on the texts beside it."""
    small = {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8} if kind is XLNetConfig else SMALL
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    model = cls(kind(vocab_size=len(piece_tokenizer()), **small, **names)).eval()
    with pytest.raises(secateur.InputError, match=r"^model: expected one whose outputs do not depend on padding"):
        list(score(model, secateur.SequenceClassification(piece_tokenizer()), ["the cat", "the cat sat"], threads=1))


def test_a_text_that_the_tokenizer_cannot_encode_is_rejected() -> None:
    tokenizer = piece_tokenizer()
    call = type(tokenizer).__call__

    class Failing(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, **options: Any) -> Any:
            if any("dog" in one for one in text):
                raise Exception("no piece for dog")
            return call(self, text, **options)

    tokenizer.__class__ = Failing
    model, task = classifier(), secateur.SequenceClassification(tokenizer)
    (batch,) = score(model, task, ["a cat", "a dog", "a bird"], threads=1)
    assert batch["reason"].to_pylist() == [None, "the tokenizer cannot encode it: no piece for dog", None]
    rows = [{"input": "a cat", "target": CLASSES[0]}, {"input": "a dog", "target": CLASSES[1]}]
    with pytest.raises(secateur.InputError, match="examples, row 2: the tokenizer cannot encode it: no piece for dog"):
        secateur.evaluate(model, task, rows)
