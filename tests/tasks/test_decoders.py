"""Labels of decoders of all kinds have the probabilities of plain forward passes; models that see the target are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, LABELS, _bart, _decoder, _encoder, _grouped, labelled, word_tokenizer
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MarianConfig,
    MarianForCausalLM,
    MptConfig,
    MptForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

import secateur
from secateur import InputError
from secateur.corpus import score

VOCABULARY = len(word_tokenizer(start=True, end=False))
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "bart": lambda: _bart(BartForCausalLM, BartConfig),  # Has no position_ids.
    "marian": lambda: _bart(MarianForCausalLM, MarianConfig),
    "roberta": lambda: _encoder(RobertaForCausalLM, RobertaConfig, ["a", "b"], vocab_size=VOCABULARY, is_decoder=True),
    "mpt": lambda: MptForCausalLM(MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
    "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**SMALL, attention_hidden_size=32)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)),
}
SEEING: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: _encoder(BertLMHeadModel, BertConfig, ["a", "b"], vocab_size=VOCABULARY),
    "llama": lambda: _grouped(LlamaForCausalLM, LlamaConfig, is_causal=False),
    "gemma3": lambda: _grouped(Gemma3ForCausalLM, Gemma3TextConfig, use_bidirectional_attention=True),
}


def drawn(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def plain(model: Any, texts: list[str]) -> Tensor:
    """Compute log P(label | text) [texts, labels] by one forward pass for each text and label, without padding."""
    tokenizer, expected = word_tokenizer(start=True, end=False), torch.zeros(len(texts), len(LABELS))
    for row, text in enumerate(texts):
        for column, label in enumerate(LABELS):
            prompt, pieces = tokenizer(text)["input_ids"], tokenizer(label, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + pieces])).logits[0].log_softmax(-1)
            expected[row, column] = sum(logits[len(prompt) - 1 + k, piece] for k, piece in enumerate(pieces))
    return expected


@pytest.mark.parametrize("name", DECODERS)
def test_labels_have_the_probabilities_of_plain_passes(name: str) -> None:
    model, rows = drawn(DECODERS[name]), labelled(LABELS)
    task = secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS)
    texts = [row["input"] for row in rows]
    expected = plain(model, texts)
    with torch.inference_mode():
        for max_tokens in (1, 40, 1000):
            torch.testing.assert_close(task.ranked(model, rows, max_tokens), expected, rtol=1e-4, atol=1e-3)
    scored = [row for batch in score(model, task, texts, threads=1) for row in batch.to_pylist()]
    assert [row["label"] for row in scored] == [LABELS[best] for best in expected.argmax(1).tolist()]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_positions_that_change_with_the_length_bound_the_inputs(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Frequencies depend on the longest input of a batch once it has more than 8 tokens, so inputs are cut to 8."""
    factors = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0], "original_max_position_embeddings": 8}
    rotary = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **(factors if kind == "longrope" else {})}
    model = drawn(lambda: _grouped(LlamaForCausalLM, LlamaConfig, rope_parameters=rotary))
    model.config.max_position_embeddings = 32 if kind == "longrope" else 8
    model = drawn(lambda: LlamaForCausalLM(model.config))
    task, rows = secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS, max_length=30), labelled(LABELS, 12)
    one, all_rows = (secateur.attribute(model, task, rows, max_tokens=most) for most in (1, 1000))
    for site in one:
        torch.testing.assert_close(one[site], all_rows[site], rtol=1e-4, atol=1e-4)
    assert "were cut" in caplog.text
    with torch.inference_mode():
        ranked = [task.ranked(model, rows, most) for most in (1, 1000)]
    torch.testing.assert_close(*ranked, rtol=1e-4, atol=1e-3)
    tokenizer = task.tokenizer
    kept = [tokenizer.decode(tokenizer(row["input"])["input_ids"][-8 + task._tree.longest :]) for row in rows]
    short = [row for row, text in enumerate(kept) if text == f"<s> {rows[row]['input']}"]
    expected = plain(model, [rows[row]["input"] for row in short])
    torch.testing.assert_close(ranked[0][short], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", SEEING)
def test_language_models_that_see_the_target_are_refused(name: str) -> None:
    model, task = drawn(SEEING[name]), CASES["llama"].task
    for use in (secateur.attribute, secateur.evaluate):
        with pytest.raises(InputError, match=r"^model: expected one whose tokens see only the tokens before them"):
            use(model, task, labelled(LABELS))


@pytest.mark.parametrize("name", ["bart", "marian", "roberta"])
def test_a_decoder_alone_is_pruned(name: str) -> None:
    model, rows = drawn(DECODERS[name]), labelled(LABELS)
    task = secateur.CausalLM(word_tokenizer(start=True, end=False), labels=LABELS)
    plan = secateur.plan(secateur.attribute(model, task, rows), keep=0.5)
    assert {site.kind for site in plan.sites} == {"self_attention", "ffn"}
    pruned, batches = secateur.prune(model, plan), task.batches(task.items(model, rows), torch.device("cpu"), max_tokens=60)
    assert secateur.verify(model, pruned, plan, task, batches).holds


def test_a_gpt2_that_computes_its_attention_in_float32_is_verified() -> None:
    options = {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}
    model, rows = drawn(lambda: _decoder(GPT2LMHeadModel, GPT2Config, n_head=4, n_inner=37, **options)), labelled(LABELS)
    task = CASES["gpt2"].task
    plan = secateur.plan(secateur.attribute(model, task, rows), keep=0.5)
    batches = task.batches(task.items(model, rows), torch.device("cpu"), max_tokens=60)
    assert secateur.verify(model, secateur.prune(model, plan), plan, task, batches).holds
