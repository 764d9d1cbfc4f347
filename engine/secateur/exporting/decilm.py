"""A folder of DeciLM's kind (Nemotron-NAS), which vLLM and SGLang load: layers without attention or FFN, FFNs of any width.

Source: vllm/model_executor/models/nemotron_nas.py of vLLM 0.33.0 and sglang/srt/models/nemotron_nas.py of SGLang 0.5.23. SGLang
knows the width of an FFN by `ffn_mult` alone, which gives multiples of 256. vLLM also reads `intermediate_size`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from secateur.exporting import configuration_decilm
from secateur.exporting.base import Source
from secateur.exporting.decoder import ATTENTION, FFN, Decoder, Layer, read_decoder, require_alike, rounded, with_zero_heads
from secateur.support.errors import InputError

CONFIG_FILE = "configuration_decilm.py"
_STEP = 256  # `ffn_mult` is rounded up to a multiple of it.
_COPIED = (
    "vocab_size", "hidden_size", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
)  # fmt: skip


def require(model: nn.Module, tokenizer: Any) -> None:
    """Refuse a model that DeciLM has not.

    Args:
        model: The model.
        tokenizer: Its tokenizer, which may be any.

    Raises:
        InputError: The architecture, a bias or the rotary positions are not DeciLM's.
    """
    config_of(filled(read_decoder(model))[0])


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write the folder. No engine is run.

    Args:
        source: The model.
        folder: The folder.

    Returns:
        What was written, for export.json.

    Raises:
        InputError: DeciLM has no such model.
    """
    decoder, zeros = filled(read_decoder(source.model))
    config = config_of(decoder) | {"dtype": str(source.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    code = Path(configuration_decilm.__file__).read_text(encoding="utf-8")
    (folder / CONFIG_FILE).write_text(code, encoding="utf-8")
    stored = {name: rounded(tensor, source.dtype).contiguous() for name, tensor in tensors(decoder).items()}
    save_torch_state_dict(stored, folder)
    source.tokenizer.save_pretrained(folder)
    generation: Any = getattr(source.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    why = why_not_sglang(config)
    return {
        "architecture": "DeciLMForCausalLM", "layers": config["block_configs"], "left_out": decoder.gone, "zeros": zeros,
        "read_by": ["vllm"] if why else ["vllm", "sglang"],
        "notes": [f"vLLM reads it, and SGLang does not: {why}" if why else "vLLM and SGLang read it, with --trust-remote-code"],
        "verification": {"run": False, "why": "not run: neither vLLM nor SGLang is run here"},
    }  # fmt: skip


def filled(decoder: Decoder) -> tuple[Decoder, list[str]]:
    """Return a decoder whose first layer has an attention, and what was filled with zeros.

    vLLM's code begins the residual stream in an attention.

    Raises:
        InputError: The attentions have different numbers of heads, which one `num_attention_heads` cannot say.
    """
    require_alike(
        decoder, lambda layer: (layer.heads, layer.groups) if layer.heads else None, "attentions with one number of heads",
        "per-layer", "DeciLM",
    )  # fmt: skip
    with_heads = [layer for layer in decoder.layers if layer.heads]
    if not with_heads:
        raise InputError("model: expected an attention in some layer, which DeciLM needs, got none; --shape uniform keeps them")
    layers = list(decoder.layers)
    if layers[0].heads:
        return decoder, []
    heads, groups = with_heads[0].heads, with_heads[0].groups
    layers[0] = with_zero_heads(layers[0], layers, heads, groups, decoder.head_dim)
    return replace(decoder, layers=layers), [f"layer {layers[0].number}: {heads} heads"]


def config_of(decoder: Decoder) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        decoder: The decoder, as `filled` returns it.

    Raises:
        InputError: DeciLM has no such biases or norms.
    """
    if decoder.architecture == "Qwen3ForCausalLM":
        raise InputError(
            "model: expected a Llama, Mistral or Qwen 2, got a Qwen 3, whose norms of queries and keys DeciLM lacks"
        )
    biases = _biases(decoder)
    first = next(layer for layer in decoder.layers if layer.heads)
    common = {name: getattr(decoder.config, name, None) for name in _COPIED}
    # vLLM gives the out-projection a bias with `attention_bias`. With `qkv_bias`, the others have one or none by that.
    own = {"attention_bias": biases["out"], "mlp_bias": biases["ffn"]}
    if biases["qkv"] != biases["out"]:
        own["qkv_bias"] = biases["qkv"]
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{Path(CONFIG_FILE).stem}.DeciLMConfig"},
        **common, **own,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.groups,
        "head_dim": decoder.head_dim,
        "rope_parameters": decoder.rope,
        "block_configs": _blocks(decoder),
    }  # fmt: skip


def _biases(decoder: Decoder) -> dict[str, bool]:
    """Which linear layers have a bias: queries, keys and values; the out-projection; the FFN. All layers must agree."""
    kinds = {"qkv": ATTENTION[:3], "out": ATTENTION[3:], "ffn": FFN}
    found = {}
    for kind, names in kinds.items():
        layers = [layer for layer in decoder.layers if (layer.width if kind == "ffn" else layer.heads)]
        present = {name in layer.biases() for layer in layers for name in names}
        if len(present) > 1:
            raise InputError(f"model: expected a bias in all of {', '.join(names)} or in none, as DeciLM has it, got some")
        found[kind] = present == {True}
    return found


def _blocks(decoder: Decoder) -> list[dict[str, Any]]:
    """The `block_configs`. They say widths by `ffn_mult`, which both engines read, where it can say all of them."""
    hidden, multiples = decoder.config.hidden_size, all(layer.width % _STEP == 0 for layer in decoder.layers)

    def attention(layer: Layer) -> dict[str, Any]:
        each = layer.heads // layer.groups if layer.heads else None
        return {"no_op": not layer.heads, "n_heads_in_group": each, "replace_with_linear": False}

    def ffn(layer: Layer) -> dict[str, Any]:
        size: dict[str, Any] = {"ffn_mult": None}
        if layer.width:
            # Both engines compute int(2 * ffn_mult * hidden / 3) and round it up to a multiple of 256.
            size = {"ffn_mult": 3 * layer.width / (2 * hidden)} if multiples else {"intermediate_size": layer.width}
        return {"no_op": not layer.width, **size, "replace_with_linear": False}

    return [{"attention": attention(layer), "ffn": ffn(layer)} for layer in decoder.layers]


def why_not_sglang(config: dict[str, Any]) -> str:
    """Return why SGLang does not read a folder that vLLM reads, "" where it does.

    Args:
        config: The content of config.json.
    """
    if any("intermediate_size" in block["ffn"] for block in config["block_configs"]):
        return f"it reads FFN widths that are multiples of {_STEP}, which pruning with --align {_STEP} gives"
    if "qkv_bias" in config or config["mlp_bias"]:
        return "it has a bias in all four linear layers of an attention or in none, and in no FFN"
    return ""


def tensors(decoder: Decoder) -> dict[str, Tensor]:
    """Return the tensors by the names that both engines read. A layer without a branch has no norm before it."""
    named = {"model.embed_tokens.weight": decoder.embedding, "model.norm.weight": decoder.norm}
    for place, layer in enumerate(decoder.layers):
        for name, tensor in layer.tensors.items():
            of_attention = name.startswith(("self_attn.", "input_layernorm."))
            if layer.heads if of_attention else layer.width:
                named[f"model.layers.{place}.{name}"] = tensor
    return named if decoder.head is None else {**named, "lm_head.weight": decoder.head}
