"""A Llama-like decoder as formats of other engines describe it: heads and neurons of each layer, and plain matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.pruning.describe import stock_class
from secateur.support.errors import InputError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPES = ("default", "linear", "llama3")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
FFN = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        number: Its number in the model that was read.
        heads: The number of query heads.
        groups: The number of key-value heads.
        width: The number of FFN neurons.
        tensors: Its tensors by the names of transformers, such as "self_attn.q_proj.weight".
    """

    number: int
    heads: int
    groups: int
    width: int
    tensors: dict[str, Tensor]

    def __str__(self) -> str:
        return f"{self.heads} heads, {self.groups} key-value heads and {self.width} neurons in layer {self.number}"

    def biases(self) -> set[str]:
        """Return the linear layers that have a bias."""
        return {name.removesuffix(".bias") for name in self.tensors if name.endswith(".bias")}


@dataclass(frozen=True)
class Decoder:
    """A decoder.

    Attributes:
        config: The config of the model.
        architecture: The name of its class in transformers.
        head_dim: The channels of a head.
        layers: The layers that do something.
        gone: The numbers of the layers that have no unit. They do nothing, so they are left out.
        embedding: The embedding [vocabulary, hidden].
        norm: The scale of the last norm [hidden].
        head: The output matrix [vocabulary, hidden], None where it is the embedding.
    """

    config: Any
    architecture: str
    head_dim: int
    layers: list[Layer]
    gone: list[int]
    embedding: Tensor
    norm: Tensor
    head: Tensor | None

    @property
    def rope(self) -> dict[str, Any]:
        """The parameters of the rotary positions."""
        return dict(self.config.rope_parameters)


def read_decoder(model: nn.Module) -> Decoder:
    """Return a model as a decoder.

    Args:
        model: The model. Its tensors are shared, not copied.

    Raises:
        InputError: The model is no Llama, Mistral, Qwen 2 or Qwen 3; something in its config is not in the formats; or a layer
            keeps parts of heads.
    """
    architecture, config = stock_class(model).__name__, cast(Any, model.config)
    if architecture not in ARCHITECTURES:
        raise InputError(f"model: expected one of {', '.join(ARCHITECTURES)}, which the format describes, got {architecture}")
    _require_common(config)
    state = model.state_dict()
    layers = [_layer(model, number, state) for number in range(config.num_hidden_layers)]
    working = [layer for layer in layers if layer.heads or layer.width]
    gone = [layer.number for layer in layers if not (layer.heads or layer.width)]
    if not working:
        raise InputError("model: expected a layer with units, got none in any layer")
    head = None if config.tie_word_embeddings else state["lm_head.weight"]
    embedding, norm = state["model.embed_tokens.weight"], state["model.norm.weight"]
    return Decoder(config, architecture, _head_dim(config), working, gone, embedding, norm, head)


def _head_dim(config: Any) -> int:
    """The channels of a head, which Qwen 2's config need not say."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _require_common(config: Any) -> None:
    """Refuse what neither llama.cpp's architectures nor DeciLM compute."""
    if config.hidden_act != "silu":
        raise InputError(f"model: expected the activation silu, which the format has, got {config.hidden_act}")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in _ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"model: expected rotary positions of type {', '.join(_ROPES)} on whole heads, got {rope}")
    require_no_window(config)


def require_no_window(config: Any) -> None:
    """Refuse attention to the last tokens alone.

    Args:
        config: The config of a decoder.

    Raises:
        InputError: A window is shorter than the longest text.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]  # Mistral slides in all layers or in none.
    if window is not None and "sliding_attention" in kinds and window < config.max_position_embeddings:
        raise InputError(
            f"model: expected attention to all earlier tokens, which the format has, got a sliding window of {window} tokens "
            f"for texts of {config.max_position_embeddings}"
        )


def _layer(model: Any, number: int, state: dict[str, Tensor]) -> Layer:
    """Read a layer. Raises InputError if it has other tensors than linear layers of whole heads and neurons."""
    prefix = f"model.layers.{number}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    linear = [*ATTENTION, *FFN]
    known = {*_NORMS, *_HEAD_NORMS, *(f"{name}.{part}" for name in linear for part in ("weight", "bias"))}
    needed = {*_NORMS, *(f"{name}.weight" for name in linear)}
    odd = sorted((tensors.keys() - known) | (needed - tensors.keys()))
    if odd:
        raise _not_plain(number, f"the tensor {odd[0]}")
    query, key, value, out, gate, up, down = (tensors[f"{name}.weight"] for name in linear)
    attention = model.get_submodule(f"{prefix}self_attn")
    size, heads, groups, width = _head_dim(model.config), len(query), len(key), len(gate)
    if (
        heads % size or groups % size or len(value) != groups or out.shape[1] != heads or bool(heads) != bool(groups)
        or (groups and heads % groups) or (heads and (attention.head_dim != size or attention.scaling != size**-0.5))
    ):  # fmt: skip
        raise _not_plain(number, f"{heads}, {groups} and {len(value)} channels of queries, keys and values")
    if len(up) != width or down.shape[1] != width:
        raise _not_plain(number, f"{width}, {len(up)} and {down.shape[1]} neurons")
    layer = Layer(number, heads // size, groups // size, width, tensors)
    for units, output in ((heads, ATTENTION[3]), (width, FFN[2])):
        if not units and f"{output}.bias" in tensors:
            raise InputError(
                f"model: expected no bias where all units are gone, as the format has no layer of a bias alone, got "
                f"{output}.bias in layer {number}; --shape uniform keeps units in each layer"
            )
    return layer


def _not_plain(number: int, got: str) -> InputError:
    """The error for a layer that keeps parts of heads, or factors."""
    return InputError(
        f"model: expected whole heads of one size and neurons in each layer, got {got} in layer {number}; pruning with --unit "
        "head and --shape per-layer gives such a model"
    )


def require_alike(decoder: Decoder, what: Callable[[Layer], Any], words: str, shape: str, needed_by: str) -> None:
    """Refuse a decoder whose layers differ.

    Args:
        decoder: The decoder.
        what: What must be the same in all layers; None where a layer may differ.
        words: What that is, in words.
        shape: The `--shape` that gives such a model.
        needed_by: What needs it.

    Raises:
        InputError: Two layers differ. The message names the first one that does.
    """
    counted = [layer for layer in decoder.layers if what(layer) is not None]
    for layer in counted:
        if what(layer) != what(counted[0]):
            raise InputError(
                f"model: expected {words}, which {needed_by} needs, got {counted[0]} and {layer}; --shape {shape} gives such a "
                "model"
            )


def with_zero_heads(layer: Layer, like: Sequence[Layer], heads: int, groups: int, head_dim: int) -> Layer:
    """Return a layer without attention with heads of zeros, which add nothing.

    Args:
        layer: The layer.
        like: All layers. The heads have biases where theirs have.
        heads: The number of query heads.
        groups: The number of key-value heads.
        head_dim: The channels of a head.
    """
    norm = layer.tensors[_NORMS[0]]
    rows = dict(zip(ATTENTION, (heads, groups, groups), strict=False))
    tensors = {f"{name}.weight": norm.new_zeros(count * head_dim, len(norm)) for name, count in rows.items()}
    tensors[f"{ATTENTION[3]}.weight"] = norm.new_zeros(len(norm), heads * head_dim)
    with_bias = set().union(*(other.biases() for other in like if other.heads))
    sizes = {name: count * head_dim for name, count in rows.items()} | {ATTENTION[3]: len(norm)}
    tensors |= {f"{name}.bias": norm.new_zeros(size) for name, size in sizes.items() if name in with_bias}
    return Layer(layer.number, heads, groups, layer.width, {**layer.tensors, **tensors})


def with_zero_neurons(layer: Layer, width: int) -> Layer:
    """Return a layer without an FFN with neurons of zeros, which add nothing.

    Args:
        layer: The layer. Its FFN has no bias.
        width: The number of neurons.
    """
    size = len(layer.tensors[_NORMS[1]])
    weight = layer.tensors[_NORMS[1]]
    tensors = {f"{name}.weight": weight.new_zeros(width, size) for name in FFN[:2]}
    tensors[f"{FFN[2]}.weight"] = weight.new_zeros(size, width)
    kept = {name: tensor for name, tensor in layer.tensors.items() if not name.startswith("mlp.")}
    return Layer(layer.number, layer.heads, layer.groups, width, {**kept, **tensors})


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype, with the values that the dtype can hold.

    Raises:
        InputError: A finite value becomes infinite.
    """
    smaller = tensor.to(dtype)
    if not bool(smaller.isfinite().all()) and bool(tensor.isfinite().all()):
        raise InputError(
            f"dtype: expected one that holds the weights, got {str(dtype).removeprefix('torch.')}, in which "
            f"{float(tensor.abs().max()):g} is infinite; --dtype bfloat16 or float32 holds it"
        )
    return smaller
