"""Sequence classifiers with a decoder: outputs, scores and sizes do not depend on how examples are batched and padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CLASSES, WORDS, _bart, _decoder, _grouped, _t5, labelled, sentences, word_tokenizer
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MT5Config,
    MT5ForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

import secateur
from secateur import InputError, SequenceClassification
from secateur.corpus import score
from secateur.measuring.synthetic import synthetic_batches
from secateur.model import cost

NAMES = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: k for k, name in enumerate(CLASSES)}}
TWO_STACKS = {
    "bart": lambda: _bart(BartForSequenceClassification, BartConfig, **NAMES),
    "t5": lambda: _t5(T5ForSequenceClassification, T5Config, pad_token_id=0, eos_token_id=1, **NAMES),
    "mt5": lambda: _t5(MT5ForSequenceClassification, MT5Config, pad_token_id=0, eos_token_id=1, **NAMES),
}
DECODERS = {
    "llama": lambda: _grouped(LlamaForSequenceClassification, LlamaConfig, **NAMES),
    "qwen2": lambda: _grouped(Qwen2ForSequenceClassification, Qwen2Config, **NAMES),
    "gpt2": lambda: _decoder(GPT2ForSequenceClassification, GPT2Config, num_attention_heads=4, initializer_range=0.3, **NAMES),
    "opt": lambda: _decoder(
        OPTForSequenceClassification,
        OPTConfig,
        num_attention_heads=4,
        ffn_dim=37,
        word_embed_proj_dim=24,
        init_std=0.3,
        **NAMES,
    ),
}
EXAMPLES = labelled(CLASSES, 12)


def made(build: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = build().eval()
    return model


def alone(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return the logits of single passes without padding [texts, classes]."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts])


def without_padding_piece(**options: Any) -> Any:
    tokenizer = word_tokenizer(**options)
    tokenizer.pad_token = None
    return tokenizer


def padded_by_end(**options: Any) -> Any:
    tokenizer = word_tokenizer(**options)
    tokenizer.pad_token = "</s>"
    return tokenizer


@pytest.mark.parametrize("pad", [0, 1, 7], ids=["padding piece", "end mark", "word"])
@pytest.mark.parametrize("make", [word_tokenizer, without_padding_piece, padded_by_end])
@pytest.mark.parametrize("ended", [False, True], ids=["no end", "end"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_classifies_as_in_single_passes(name: str, make: Any, ended: bool, pad: int) -> None:
    model: Any = made(DECODERS[name])
    model.config.pad_token_id = pad  # Also an id that the tokenizer does not pad with, and one that the texts contain.
    texts = [*sentences(9), WORDS[7 - 4], f"a {WORDS[7 - 4]}"]
    task = SequenceClassification(make(start=True, end=ended))
    expected = alone(model, task.tokenizer, texts)
    with torch.no_grad():
        ranked = task.ranked(model, [{"input": text} for text in texts], 4096)
    assert torch.allclose(ranked, expected, atol=1e-5)
    rows = [row for batch in score(model, task, texts, threads=1) for row in batch.to_pylist()]
    probabilities = torch.tensor([[row[f"p_{label}"] for label in CLASSES] for row in rows])
    assert torch.allclose(probabilities, expected.softmax(1), atol=1e-5)


@pytest.mark.parametrize("name", TWO_STACKS)
def test_two_stacks_classify_as_in_single_passes(name: str) -> None:
    model, task = made(TWO_STACKS[name]), SequenceClassification(without_padding_piece(start=False, end=True))
    ranked = task.ranked(model, EXAMPLES, 4096)
    assert torch.allclose(ranked, alone(model, task.tokenizer, sentences(12)), atol=1e-5)


@pytest.mark.parametrize("name", [*TWO_STACKS, "llama", "gpt2"])
@pytest.mark.parametrize("criterion", ["gradient", "wanda", "fpp", "flap", "ig:nodes=2"])
def test_scores_do_not_depend_on_batches(name: str, criterion: str) -> None:
    build = {**TWO_STACKS, **DECODERS}[name]
    model, task = (
        made(build),
        SequenceClassification(without_padding_piece(start=name not in TWO_STACKS, end=name in TWO_STACKS)),
    )
    together, single = (
        secateur.attribute(model, task, EXAMPLES, criterion=criterion, max_tokens=tokens) for tokens in (4096, 1)
    )
    for site in single:
        assert torch.allclose(together[site], single[site], rtol=1e-3, atol=1e-5 * float(single[site].abs().max())), site
    lengths = [len(task.tokenizer(row["input"])["input_ids"]) for row in EXAMPLES]
    assert single.tokens["decoder"] == sum(lengths) / len(lengths)


@pytest.mark.parametrize("name", TWO_STACKS)
def test_block_influence_does_not_depend_on_batches(name: str) -> None:
    model, task = made(TWO_STACKS[name]), SequenceClassification(word_tokenizer(start=False, end=True))
    together, single = (secateur.layer_scores(model, task, EXAMPLES, max_tokens=tokens) for tokens in (4096, 1))
    assert together == pytest.approx(single, rel=1e-4)


@pytest.mark.parametrize("name", TWO_STACKS)
def test_a_classifier_of_two_stacks_is_pruned_verified_and_recovered(name: str) -> None:
    model, task = made(TWO_STACKS[name]), SequenceClassification(word_tokenizer(start=False, end=True))
    plan = secateur.plan(secateur.attribute(model, task, EXAMPLES), keep=0.5)
    pruned = secateur.prune(model, plan)
    batches = task.batches(task.items(model, EXAMPLES), torch.device("cpu"), 64)
    assert secateur.verify(model, pruned, plan, task, batches).holds
    refits = secateur.recover_(model, pruned, task, EXAMPLES, max_tokens=64)
    assert {refit.branch.partition(".")[0] for refit in refits if refit.after < refit.before} == {"encoder", "decoder"}


@pytest.mark.parametrize("name", TWO_STACKS)
def test_synthetic_batches_run_through_a_classifier_of_two_stacks(name: str) -> None:
    model = made(TWO_STACKS[name])
    (batch,) = synthetic_batches(model, [3], [9])
    assert "decoder_input_ids" not in batch
    assert model(**batch).logits.shape == (3, 3)
    (longer,) = synthetic_batches(model, [3], [18])
    assert cost.flops(model, longer) > 1.8 * cost.flops(model, batch)  # The decoder runs over the input too.


@pytest.mark.parametrize("pad", [None, -1, 4000])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_that_cannot_find_the_end_of_a_text_is_refused(name: str, pad: int | None) -> None:
    model: Any = made(DECODERS[name])
    model.config.pad_token_id = pad
    task = SequenceClassification(word_tokenizer(start=True, end=False))
    for use in (secateur.evaluate, secateur.attribute, secateur.layer_scores):
        with pytest.raises(InputError, match=f"^model: expected a pad_token_id in its config.*got {pad}"):
            use(model, task, EXAMPLES)
    with pytest.raises(InputError, match="pad_token_id"):
        list(score(model, task, sentences(3), threads=1))


def test_an_encoder_needs_no_padding_id() -> None:
    from cases import CASES

    model: Any = CASES["bert-sequence"].model()
    model.config.pad_token_id = None
    assert secateur.evaluate(model, CASES["bert-sequence"].task, CASES["bert-sequence"].examples).examples == 7


@pytest.mark.parametrize("field", ["decoder_start_token_id", "pad_token_id"])
@pytest.mark.parametrize("name", TWO_STACKS)
def test_a_missing_start_of_the_decoder_is_refused(name: str, field: str) -> None:
    model: Any = made(TWO_STACKS[name])
    setattr(model.config, field, None)
    task = SequenceClassification(word_tokenizer(start=False, end=True))
    with pytest.raises(InputError, match=f"^model: expected a {field} in its config"):
        secateur.evaluate(model, task, EXAMPLES)


@pytest.mark.parametrize("name", TWO_STACKS)
def test_texts_with_another_number_of_end_marks_are_refused(name: str) -> None:
    model, rows = made(TWO_STACKS[name]), [{**EXAMPLES[0]}, {**EXAMPLES[1], "input": "a </s> cat"}, *EXAMPLES[2:]]
    with pytest.raises(InputError, match=r"^examples, row 2: 2 end marks, at the last of which .* expected one"):
        secateur.evaluate(model, SequenceClassification(word_tokenizer(start=False, end=True)), rows)
    with pytest.raises(InputError, match=r"^examples, row 1: 0 end marks, at the last of which .* expected one"):
        secateur.evaluate(model, SequenceClassification(word_tokenizer(start=False, end=False)), rows)
