"""Folders to export: small decoders of several shapes, with byte-level tokenizers of the kinds that llama.cpp knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cases import sentences
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import secateur
from secateur.model.discovery import fingerprint

HIDDEN, HEADS, GROUPS, SIZE, WIDTH, LAYERS = 48, 6, 3, 8, 300, 5
VOCABULARY = 420
FAMILIES: dict[str, tuple[type[nn.Module], type[Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear-rope": (
        LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
}  # fmt: skip
WORDS: dict[str, Any] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS["gpt-2"]()]),
    "llama-bpe": lambda: _split("\\p{N}{1,3}"),
    "qwen2": lambda: _split("\\p{N}"),
}


def _split(digits: str) -> Any:
    """The pre-tokenizer of Llama 3's and Qwen 2's tokenizer.json."""
    pattern = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
        + digits
        + "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
        "\\s+(?!\\S)|\\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_pairs(words: str = "smollm", *, start: bool = False) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE.

    Args:
        words: llama.cpp's name of how words are split.
        start: Whether texts begin with the first token.
    """
    tokenizer: Any = Tokenizer(BPE(ignore_merges=words == "llama-bpe"))
    tokenizer.pre_tokenizer = WORDS[words]()
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    special = ["<|begin|>", "<|end|>"]
    trainer: Any = BpeTrainer(
        vocab_size=VOCABULARY - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([*sentences(60), "It wasn't 1234 or 5 we'll say\n\n  so. " * 4], trainer)
    if start:
        tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages[0]['content'] }}", **names)


def decoder(family: str = "llama", **options: Any) -> Any:
    """Build a decoder with random weights that make its predictions depend on every part."""
    torch.manual_seed(1)
    cls, config, own = FAMILIES[family]
    model: Any = cls(
        config(
            **{
                "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
                "num_key_value_heads": GROUPS, "head_dim": SIZE, "intermediate_size": WIDTH, "max_position_embeddings": 256,
                "initializer_range": 0.15, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
                **own, **options,
            }
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # Norms are 1 and biases 0 in a new model.
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def pruned(model: nn.Module, heads: list[int], widths: list[int]) -> nn.Module:
    """Prune a decoder to these numbers of key-value heads and neurons in its layers. Which ones stay is drawn."""
    generator, kept = torch.Generator().manual_seed(0), {}
    for site in secateur.sites(model):
        count = (heads if site.is_head else widths)[site.layer]
        kept[site.name] = torch.randperm(site.units, generator=generator)[:count].sort().values
    return secateur.prune(model, secateur.Plan(kept, tuple(secateur.sites(model)), fingerprint(model)))


# Key-value heads and neurons by shape. In "uneven", layers 0 and 3 have no attention, layers 2 and 3 no FFN.
SHAPES: dict[str, tuple[list[int], list[int]]] = {
    "uniform": ([2] * LAYERS, [70] * LAYERS),
    "per-layer": ([3, 0, 3, 3, 0], [256, 37, 300, 1, 64]),
    "uneven": ([0, 1, 3, 0, 2], [37, 300, 0, 0, 5]),
}


def folder(
    path: Path, family: str = "llama", shape: str = "stock", *, tokenizer: Any = None, dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:  # fmt: skip
    """Write the folder of a decoder of one of the shapes, and return its path."""
    model: Any = decoder(family, **options)
    if shape != "stock":
        model = pruned(model, *SHAPES[shape])
    secateur.save(model.to(dtype), path, tokenizer=tokenizer or byte_pairs())
    return path


def report(path: Path) -> dict[str, Any]:
    """Return the content of export.json."""
    content: dict[str, Any] = json.loads((path / "export.json").read_text(encoding="utf-8"))
    return content
