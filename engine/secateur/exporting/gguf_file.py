"""GGUF for llama.cpp: the architecture `llama` where the layers are alike, `deci` where they differ.

Both compute the same layer. `deci` (DeciLM, Nemotron-NAS) has the numbers of heads, key-value heads and neurons of each layer.
Qwen 3, which norms queries and keys, has the architecture `qwen3`, whose layers are alike.

Source: src/models/llama.cpp, deci.cpp and qwen3.cpp of llama.cpp, and its conversion/llama.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.exporting.base import Source
from secateur.exporting.decoder import Decoder, Layer, read_decoder, require_alike, with_zero_heads, with_zero_neurons
from secateur.exporting.gguf_tokenizer import add_tokenizer, words_of
from secateur.exporting.llama_cpp import compared, in_gguf, installed
from secateur.support.errors import InputError

FILE = "model.gguf"
# The neurons of zeros in a layer without an FFN. llama.cpp's quantised types have blocks of 32 columns.
ZERO_NEURONS = 32
_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def require(model: nn.Module, tokenizer: Any) -> None:
    """Refuse a model or a tokenizer that llama.cpp does not know.

    Args:
        model: The model.
        tokenizer: Its tokenizer.

    Raises:
        InputError: The model or its tokenizer is not in llama.cpp's architectures.
    """
    read_decoder(model)
    words_of(tokenizer)


def write(source: Source, folder: Path) -> dict[str, Any]:
    """Write the file, and compare llama.cpp with PyTorch on it where xllamacpp is installed.

    Args:
        source: The model.
        folder: The folder for the file.

    Returns:
        What was written, for export.json.

    Raises:
        InputError: The model or its tokenizer is not in llama.cpp's architectures.
        VerificationError: llama.cpp computes something else from the file.
    """
    decoder, zeros = filled(read_decoder(source.model))
    architecture = architecture_of(decoder)
    notes = _write_file(folder / FILE, decoder, architecture, source, source.dtype)
    precise = folder / FILE
    if source.dtype != torch.float32 and installed():
        precise = folder / "float32.gguf"
        _write_file(precise, decoder, architecture, source, torch.float32)
    verification = compared(source, folder / FILE, precise)
    if precise != folder / FILE:
        precise.unlink()
    return {
        "architecture": architecture,
        "layers": [{"heads": layer.heads, "key_value_heads": layer.groups, "neurons": layer.width} for layer in decoder.layers],
        "left_out": decoder.gone, "zeros": zeros, "notes": notes, "verification": verification,
    }  # fmt: skip


def filled(decoder: Decoder) -> tuple[Decoder, list[str]]:
    """Return a decoder in which llama.cpp skips nothing, and what was filled with zeros.

    llama.cpp skips a whole layer whose FFN has no neuron, and takes the size of a head from the first layer.
    """
    zeros, layers = [], list(decoder.layers)
    if not layers[0].heads:
        layers[0] = with_zero_heads(layers[0], layers, 1, 1, decoder.head_dim)
        zeros.append(f"layer {layers[0].number}: one head")
    for place, layer in enumerate(layers):
        if not layer.width:
            layers[place] = with_zero_neurons(layer, ZERO_NEURONS)
            zeros.append(f"layer {layer.number}: {ZERO_NEURONS} neurons")
    return replace(decoder, layers=layers), zeros


def architecture_of(decoder: Decoder) -> str:
    """Return llama.cpp's architecture for a decoder.

    Raises:
        InputError: No architecture has its layers.
    """

    def shape(layer: Layer) -> tuple[int, int, int]:
        return layer.heads, layer.groups, layer.width

    if decoder.architecture == "Qwen3ForCausalLM":
        if decoder.layers[0].biases() or decoder.rope.get("rope_type") == "llama3":
            raise InputError("model: expected a Qwen 3 without biases and with its own rotary positions, as llama.cpp has it")
        require_alike(decoder, shape, "layers that are alike", "uniform", "llama.cpp's architecture qwen3")
        return "qwen3"
    return "llama" if len({shape(layer) for layer in decoder.layers}) == 1 else "deci"


def _write_file(path: Path, decoder: Decoder, architecture: str, source: Source, dtype: torch.dtype) -> list[str]:
    """Write the values that the source's dtype has, in a dtype that holds them. Returns notes on where llama.cpp differs."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, decoder, architecture, source.name, dtype)
    notes = add_tokenizer(writer, source.tokenizer, len(decoder.embedding))
    kinds = {torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16}
    for name, tensor in tensors(decoder, interleaved=architecture != "qwen3"):
        stored = in_gguf(in_gguf(tensor, source.dtype), dtype).contiguous()
        # NumPy has no bfloat16: the writer takes bytes.
        kind = kinds.get(stored.dtype, gguf.GGMLQuantizationType.BF16)
        writer.add_tensor(name, stored.view(torch.uint8).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def _add_sizes(writer: Any, decoder: Decoder, architecture: str, name: str, dtype: torch.dtype) -> None:
    """Write the fields that describe the model."""
    import gguf

    config, rope, layers = decoder.config, decoder.rope, decoder.layers
    types = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[types[dtype]])
    writer.add_block_count(len(layers))
    writer.add_vocab_size(len(decoder.embedding))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    each = ([layer.heads for layer in layers], [layer.groups for layer in layers], [layer.width for layer in layers])
    heads, groups, widths = each if architecture == "deci" else (numbers[0] for numbers in each)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_feed_forward_length(widths)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def tensors(decoder: Decoder, *, interleaved: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a decoder by llama.cpp's names.

    Args:
        decoder: The decoder.
        interleaved: Whether the two channels that a rotation turns are neighbours, as in `llama` and `deci`. In transformers
            and in `qwen3`, they are half a head apart.
    """
    yield "token_embd.weight", decoder.embedding
    for place, layer in enumerate(decoder.layers):
        for name, tensor in layer.tensors.items():
            module, _, part = name.rpartition(".")
            if not layer.heads and (module.startswith("self_attn.") or module == "input_layernorm"):
                continue  # llama.cpp expects no tensor of an attention without heads.
            count = {"self_attn.q_proj": layer.heads, "self_attn.k_proj": layer.groups}.get(module)
            if interleaved and count is not None:
                tensor = interleave(tensor, count)
            yield f"blk.{place}.{_NAMES[module]}.{part}", tensor
    yield "output_norm.weight", decoder.norm
    if decoder.head is not None:
        yield "output.weight", decoder.head
    if decoder.rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", rope_factors(decoder.rope, decoder.head_dim)


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Put the two channels that a rotation turns side by side.

    Args:
        rows: The weight [heads * size, hidden] or the bias [heads * size] of queries or keys. Channel i turns with channel
            i + size / 2.
        heads: The number of heads.
    """
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])  # [heads, 2, size / 2, ...]
    return halves.transpose(1, 2).reshape(rows.shape)


def rope_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Return what llama.cpp divides each frequency by, for Llama 3's rotary positions (`rope_type` "llama3").

    Args:
        rope: The parameters of the rotary positions.
        head_dim: The channels of a head.

    Returns:
        The factors, float32 [head_dim / 2].
    """
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(rope["original_max_position_embeddings"])
    wavelengths = [2 * math.pi * float(rope["rope_theta"]) ** (i / head_dim) for i in range(0, head_dim, 2)]
    factors = []
    for length in wavelengths:
        # 1 for waves shorter than trained / high, 1 / factor for those longer than trained / low, and between them in between.
        smooth = min(max((trained / length - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)
