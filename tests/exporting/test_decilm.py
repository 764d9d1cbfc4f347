"""Folders of DeciLM's kind: the shapes that vLLM's code builds from the config, weight by weight, and what it computes.

Neither vLLM nor SGLang runs here. `vllm_shapes` and `Forward` follow vllm/model_executor/models/nemotron_nas.py of vLLM 0.33.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Run, assert_refused
from exported import FAMILIES, HEADS, LAYERS, VOCABULARY, byte_pairs, decoder, folder, pruned, report
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import secateur
from secateur.exporting.decilm import why_not_sglang


def loaded(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the config as vLLM reads it, by the folder's own code, and the weights."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    return config, load_file(path / "model.safetensors")


def vllm_width(ffn: Any, hidden: int) -> int:
    """The width of an FFN."""
    if not hasattr(ffn, "ffn_mult"):
        return int(ffn.intermediate_size)
    width = int(2 * ffn.ffn_mult * hidden / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


def vllm_shapes(config: Any) -> dict[str, list[int]]:
    """Return the shapes of the weights that vLLM's code builds, before it joins some of them."""
    hidden, size = config.hidden_size, config.head_dim
    shapes = {"model.embed_tokens.weight": [config.vocab_size, hidden], "model.norm.weight": [hidden]}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = [config.vocab_size, hidden]
    bias = out_bias = getattr(config, "attention_bias", False)
    bias = config.qkv_bias if hasattr(config, "qkv_bias") else bias
    for number in range(config.num_hidden_layers):
        block, prefix = config.block_configs[number], f"model.layers.{number}"
        if not block.attention.no_op:
            heads = config.num_attention_heads
            groups = heads // block.attention.n_heads_in_group
            for name, count in (("q", heads), ("k", groups), ("v", groups)):
                shapes[f"{prefix}.self_attn.{name}_proj.weight"] = [count * size, hidden]
                if bias:
                    shapes[f"{prefix}.self_attn.{name}_proj.bias"] = [count * size]
            shapes[f"{prefix}.self_attn.o_proj.weight"] = [hidden, heads * size]
            if out_bias:
                shapes[f"{prefix}.self_attn.o_proj.bias"] = [hidden]
            shapes[f"{prefix}.input_layernorm.weight"] = [hidden]
        if not block.ffn.no_op:
            width = vllm_width(block.ffn, hidden)
            for name, shape in (("gate", [width, hidden]), ("up", [width, hidden]), ("down", [hidden, width])):
                shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
                if config.mlp_bias:
                    shapes[f"{prefix}.mlp.{name}_proj.bias"] = shape[:1]
            shapes[f"{prefix}.post_attention_layernorm.weight"] = [hidden]
    return shapes


class Forward:
    """What vLLM's code computes from a config and weights, for one text. The residual stream begins in an attention."""

    def __init__(self, config: Any, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def attention(self, name: str, x: Tensor, groups: int) -> Tensor:
        heads, size = self.config.num_attention_heads, self.config.head_dim
        query, key, value = (
            self.linear(f"{name}.{part}_proj", x).reshape(1, len(x), -1, size).transpose(1, 2) for part in "qkv"
        )  # [1, heads, T, size]
        cos, sin = LlamaRotaryEmbedding(self.config)(x, torch.arange(len(x))[None])
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        key, value = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.linear(f"{name}.o_proj", mixed[0].transpose(0, 1).flatten(1))

    def __call__(self, ids: Tensor) -> Tensor:
        hidden, residual = self.weights["model.embed_tokens.weight"][ids], None
        for number, block in enumerate(self.config.block_configs):
            name = f"model.layers.{number}"
            if not block.attention.no_op:
                residual = hidden if residual is None else hidden + residual
                groups = self.config.num_attention_heads // block.attention.n_heads_in_group
                hidden = self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", residual), groups)
            if not block.ffn.no_op:
                assert residual is not None
                residual = hidden + residual
                hidden = self.norm(f"{name}.post_attention_layernorm", residual)
                gate, up = (self.linear(f"{name}.mlp.{part}_proj", hidden) for part in ("gate", "up"))
                hidden = self.linear(f"{name}.mlp.down_proj", functional.silu(gate) * up)
        assert residual is not None
        hidden = self.norm("model.norm", hidden + residual)
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return functional.linear(hidden, self.weights[f"{head}.weight"])


SHAPES = [(name, "stock") for name in FAMILIES if name != "qwen3"] + [
    ("llama", "uniform"), ("llama", "per-layer"), ("llama-tied", "per-layer"), ("mistral", "per-layer"), ("qwen2", "per-layer")
]  # fmt: skip


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_the_folder_has_the_weights_that_vllm_builds(family: str, shape: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "m", family, shape)
    secateur.export(source, tmp_path / "out", format="decilm")
    config, weights = loaded(tmp_path / "out")
    assert (config.model_type, config.architectures) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert {name: list(tensor.shape) for name, tensor in weights.items()} == vllm_shapes(config)
    before = secateur.load(source).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_it_computes_the_same_as_vllm_builds_it(family: str, shape: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "m", family, shape)
    secateur.export(source, tmp_path / "out", format="decilm")
    ids = torch.randint(VOCABULARY, (40,))
    model: Any = secateur.load(source)
    with torch.no_grad():
        assert torch.allclose(Forward(*loaded(tmp_path / "out"))(ids), model(ids[None]).logits[0], atol=2e-4)


def test_a_first_layer_without_attention_gets_heads_of_zeros(tmp_path: Path) -> None:
    model: Any = pruned(decoder("qwen2"), [0, 3, 0, 0, 3], [40, 0, 0, 300, 9])
    secateur.save(model, tmp_path / "m", tokenizer=byte_pairs())
    exported = secateur.export(tmp_path / "m", tmp_path / "out", format="decilm")
    assert exported.document["zeros"] == [f"layer 0: {HEADS} heads"]
    assert exported.document["left_out"] == [2]
    config, weights = loaded(tmp_path / "out")
    assert config.num_hidden_layers == LAYERS - 1
    assert [block.attention.no_op for block in config.block_configs] == [False, False, True, False]
    assert [block.ffn.no_op for block in config.block_configs] == [False, True, False, False]
    assert {name: list(tensor.shape) for name, tensor in weights.items()} == vllm_shapes(config)
    ids = torch.randint(VOCABULARY, (30,))
    with torch.no_grad():
        assert torch.allclose(Forward(config, weights)(ids), model(ids[None]).logits[0], atol=2e-4)


@pytest.mark.parametrize("hidden", [48, 60])
def test_widths_that_sglang_reads(hidden: int, tmp_path: Path) -> None:
    """SGLang reads `ffn_mult` alone, and has the widths that it gives."""
    model: Any = pruned(decoder(hidden_size=hidden, intermediate_size=1100), [3] * LAYERS, [256, 512, 768, 0, 1024])
    secateur.save(model, tmp_path / "m", tokenizer=byte_pairs())
    exported = secateur.export(tmp_path / "m", tmp_path / "out", format="decilm", dtype="bfloat16")
    config, weights = loaded(tmp_path / "out")
    assert exported.document["read_by"] == ["vllm", "sglang"]
    assert [vllm_width(block.ffn, hidden) for block in config.block_configs if not block.ffn.no_op] == [256, 512, 768, 1024]
    assert all("intermediate_size" not in block.ffn for block in config.block_configs)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert config.dtype == torch.bfloat16


def test_why_sglang_does_not_read_a_folder(tmp_path: Path) -> None:
    for family, shape, why in (
        ("llama", "per-layer", "it reads FFN widths that are multiples of 256, which pruning with --align 256 gives"),
        ("qwen2", "stock", "it has a bias in all four linear layers of an attention or in none, and in no FFN"),
    ):
        options: dict[str, Any] = {"intermediate_size": 256} if shape == "stock" else {}
        source = folder(tmp_path / f"{family}-m", family, shape, **options)
        exported = secateur.export(source, tmp_path / family, format="decilm")
        assert exported.document["read_by"] == ["vllm"]
        assert exported.lines()[-2:] == [
            f"vLLM reads it, and SGLang does not: {why}", "not run: neither vLLM nor SGLang is run here"
        ]  # fmt: skip
        assert why_not_sglang(json.loads((tmp_path / family / "config.json").read_text())) == why


def test_the_folder_has_the_tokenizer_and_a_report(tmp_path: Path) -> None:
    secateur.export(folder(tmp_path / "m"), tmp_path / "out", format="decilm")
    text = "the cat sat on the mat 12"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == byte_pairs()(text)
    assert report(tmp_path / "out")["verification"]["run"] is False
    assert (tmp_path / "out/generation_config.json").is_file()


def test_models_that_decilm_does_not_hold_are_refused(tmp_path: Path, run: Run) -> None:
    def refused(name: str, family: str, shape: str, message: str) -> None:
        folder(tmp_path / name, family, shape)
        assert_refused(run(f"export {name} --format decilm --out bad"), message, "bad")

    refused("a", "qwen3", "stock", "model: expected a Llama, Mistral or Qwen 2, got a Qwen 3")
    # Layer 0 of "uneven" has no attention, so that layer 1 is the first that counts, and layer 2 the first that differs.
    message = (
        "model: expected attentions with one number of heads, which DeciLM needs, got 2 heads, 1 key-value heads and 300 "
        "neurons in layer 1 and 6 heads, 3 key-value heads and 0 neurons in layer 2; --shape per-layer gives such a model"
    )
    refused("b", "llama", "uneven", message)
    secateur.save(pruned(decoder(), [0] * LAYERS, [9] * LAYERS), tmp_path / "c", tokenizer=byte_pairs())
    assert_refused(run("export c --format decilm --out bad"), "model: expected an attention in some layer", "bad")
    folder(tmp_path / "d")
    assert run("export d --format decilm --out good").code == 0
    assert_refused(run("export d --format decilm --out good"), "out: expected a folder that does not exist", "bad")
    assert run("export d --format decilm --out good --overwrite --json").document["architecture"] == "DeciLMForCausalLM"
