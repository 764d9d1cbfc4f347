"""CTranslate2: its outputs beside PyTorch's, and shapes that it does not hold."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, WORDS
from command import Run, assert_refused
from exported import byte_pairs, decoder
from exported_tasks import padded_texts, task_folder
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import secateur
from secateur.exporting import comparing, ct2
from secateur.model.discovery import fingerprint
from secateur.support.errors import VerificationError

ctranslate2: Any = pytest.importorskip("ctranslate2", reason="needs ctranslate2: pip install 'secateur[ct2]'")
OPTIONS = {"device": "cpu", "compute_type": "float32"}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 31, "intermediate_size": 37, "initializer_range": 0.3}
# What the cases of these families have and the converter does not read: other heads in the decoder, windows, padding of id 0.
OTHER = {
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=31, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=37, decoder_ffn_dim=29, max_position_embeddings=40, init_std=0.3, pad_token_id=0, eos_token_id=1,
            bos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
        )
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SMALL, num_attention_heads=6, num_key_value_heads=3, head_dim=6, sliding_window=None, pad_token_id=0)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    ),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(
            **{**SMALL, "vocab_size": 36}, num_attention_heads=4, max_position_embeddings=40, pad_token_id=1, num_labels=3,
            id2label=dict(enumerate(["negative", "neutral", "positive"])),
            label2id={"negative": 0, "neutral": 1, "positive": 2},
        )
    ),
}  # fmt: skip
NAMES = ["t5-gated", "t5-relu", "mt5", "bart", "bert-sequence", "bert-token", "roberta", "distilbert"]
NAMES += ["llama", "llama-mqa", "mistral", "qwen2", "qwen3", "gpt2"]


def dense(name: str) -> Any:
    """Return the model of a name, without the details that the converter does not read."""
    torch.manual_seed(0)
    return OTHER[name]().eval() if name in OTHER else None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_ctranslate2_computes_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    shape = "dense" if name == "llama-mqa" else "stock"  # Its only key-value head cannot go.
    exported = secateur.export(task_folder(tmp_path / "m", name, shape, dense(name)), tmp_path / "o", format="ct2", dtype=dtype)
    proof = exported.document["verification"]
    assert 0 < proof["largest_difference"] <= proof["bound"] < 1e-3
    assert exported.lines()[-1].startswith(f"verified: {proof['what']} of ctranslate2 ")
    assert exported.document["zeros"] == (["the pooler"] if name == "bert-token" else [])


def marian() -> tuple[Any, secateur.TextToText]:
    """A Marian and its task. As in real ones, the padding is the last token and starts the decoder."""
    words = ["</s>", "<unk>", *WORDS, "<pad>"]
    backend: Any = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    torch.manual_seed(0)
    last = len(words) - 1
    model: Any = MarianMTModel(
        MarianConfig(
            vocab_size=len(words), d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, eos_token_id=0,
            decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=29, max_position_embeddings=40, init_std=0.3,
            pad_token_id=last, decoder_start_token_id=last, forced_eos_token_id=None, scale_embedding=True,
        )
    ).eval()  # fmt: skip
    model.final_logits_bias.normal_()
    return model, secateur.TextToText(tokenizer)


def test_a_marian_computes_the_same(tmp_path: Path) -> None:
    model, task = marian()
    sites = tuple(secateur.sites(model))
    kept = {site.name: torch.arange(site.units if site.is_head else site.units // 2) for site in sites}
    secateur.save(secateur.prune(model, secateur.Plan(kept, sites, fingerprint(model))), tmp_path / "m", task=task)
    proof = secateur.export(tmp_path / "m", tmp_path / "out", format="ct2").document["verification"]
    assert 0 < proof["largest_difference"] <= proof["bound"] < 1e-3


@pytest.mark.parametrize("family", ["llama3-rope", "llama-linear-rope"])
def test_rotary_positions_are_told(family: str, tmp_path: Path) -> None:
    secateur.save(decoder(family), tmp_path / "m", tokenizer=byte_pairs())
    proof = secateur.export(tmp_path / "m", tmp_path / "out", format="ct2").document["verification"]
    assert 0 < proof["largest_difference"] <= proof["bound"] < 1e-3


def test_a_window_is_refused(tmp_path: Path, run: Run) -> None:
    secateur.save(decoder("mistral", sliding_window=8), tmp_path / "m", tokenizer=byte_pairs())
    assert_refused(run("export m --format ct2 --out bad"), "model: expected attention to all earlier tokens", "bad")


def test_what_the_engine_does_not_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, folder: Path) -> None:
        raise ValueError("buffer to copy is too large")

    source = task_folder(tmp_path / "m", "gpt2", "dense")
    monkeypatch.setattr(ct2._Generator, "engine", broken)
    with pytest.raises(VerificationError, match=r"ctranslate2 does not run the folder: .*buffer to copy is too large"):
        secateur.export(source, tmp_path / "out", format="ct2")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_classifier_is_whole_with_its_head(tmp_path: Path) -> None:
    """As docs/usage/serving.md does it."""
    source = task_folder(tmp_path / "m", "bert-sequence", "stock")
    exported = secateur.export(source, tmp_path / "out", format="ct2")
    batch = padded_texts("bert-sequence", ["input_ids", "attention_mask"])
    model: Any = secateur.load(source)
    with torch.inference_mode():
        expected = model(**batch).logits
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    encoder, head = ctranslate2.Encoder(str(tmp_path / "out"), **OPTIONS), load_file(tmp_path / "out" / "head.safetensors")
    pooled = torch.from_numpy(np.array(encoder.forward_batch(rows).pooler_output))
    assert torch.allclose(pooled @ head["classifier.weight"].T + head["classifier.bias"], expected, atol=1e-4)
    assert exported.document["labels"] == {0: "negative", 1: "neutral", 2: "positive"}


def test_a_wrong_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = task_folder(tmp_path / "m", "t5-relu", "stock")

    def then_changed(model: Any, run: Any) -> comparing.Expected:
        reference = comparing.expected(model, run)
        with torch.no_grad():
            model.decoder.block[0].layer[1].EncDecAttention.v.weight[0] += 0.01
        return reference

    monkeypatch.setattr(ct2, "expected", then_changed)
    with pytest.raises(VerificationError, match=r"^nothing was written: log-probabilities of ctranslate2 .* differ"):
        secateur.export(source, tmp_path / "out", format="ct2")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_shapes_that_the_converter_does_not_take_are_refused(tmp_path: Path, run: Run) -> None:
    def refused(name: str, shape: str, *words: str) -> None:
        source = task_folder(tmp_path / f"{name}-{shape}", name, shape)
        result = run(f"export {source.name} --format ct2 --out bad")
        assert_refused(result, "tokenizer: expected" if name == "marian" else "model: expected", "bad")
        assert all(word in result.errors[-1] for word in words), result.errors[-1]

    refused("bert-sequence", "any", "no units in bert.encoder.layer.0.attention", "--shape stock")
    refused("t5-relu", "any", "no units in encoder.block.0.layer.0.SelfAttention", "--shape stock")
    refused("gemma3", "dense", "for ct2, got Gemma3ForCausalLM")
    refused("marian", "dense", "the padding as the last of 31 tokens")
    refused("bart", "dense", "4 in the encoder and 6 in the decoder")
    model: Any = CASES["llama"].model()
    sites = secateur.sites(model)
    kept = {site.name: torch.arange(site.units - (site.layer if not site.is_head else 0)) for site in sites}
    pruned = secateur.prune(model, secateur.Plan(kept, tuple(sites), fingerprint(model)))
    secateur.save(pruned, tmp_path / "widths", task=CASES["llama"].task)
    errors = run("export widths --format ct2 --out bad").errors[-1]
    differs = "intermediate_size 37 in model.layers.0.mlp.gate_proj and 36 in model.layers.1.mlp.gate_proj"
    assert f"{differs}; --shape stock gives such a model" in errors


def test_what_the_converter_refuses_is_said(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    task_folder(tmp_path / "m", "gpt2", "dense")
    converters = import_module("ctranslate2.converters.transformers")
    monkeypatch.setattr(converters, "_MODEL_LOADERS", {})
    line = "model: expected one that CTranslate2's converter takes, got GPT2LMHeadModel: No"
    assert_refused(run("export m --format ct2 --out bad"), line, "bad")
