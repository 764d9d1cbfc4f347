"""The expectations of servers that cannot run here, taken from their sources, and whether a folder meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from safetensors import safe_open

from bench.compatibility.folder import Folder
from bench.compatibility.outcome import Outcome

Shapes = dict[str, list[int]]
Config = dict[str, Any]


def vllm(folder: Folder) -> Outcome:
    """Check the folder against vllm/model_executor/models, llama.py and bert.py.

    All layers have one width, which the config states. The config may state head_dim.
    """
    expected = {"llama": _llama(lambda c: c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]), "bert": _bert}
    return _checked(folder, expected[folder.family])


def text_embeddings_inference(folder: Folder) -> Outcome:
    """Check the folder against backends/candle/src/models/bert.rs of text-embeddings-inference 1.9.3.

    A head has hidden size / heads channels.
    """
    return _checked(folder, _bert)


def text_generation_inference(folder: Folder) -> Outcome:
    """Check the folder against server/.../flash_llama_modeling.py and t5_modeling.py.

    A head has hidden size / heads channels in Llama, and d_kv channels in T5.
    """
    return _checked(folder, {"llama": _llama(lambda c: c["hidden_size"] // c["num_attention_heads"]), "t5": _t5}[folder.family])


def _checked(folder: Folder, expected: Callable[[Config], Shapes]) -> Outcome:
    """Compare the weights' shapes with the shapes that the server builds from the config."""
    config = json.loads((folder.model / "config.json").read_text())
    if "auto_map" in config:
        return Outcome("fails", "not run; its own class can't have this shape: the config needs the folder's modelling file")
    with safe_open(folder.model / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    expected_shapes = expected(config)
    mismatches = [name for name, shape in expected_shapes.items() if shapes.get(name) != shape]
    if mismatches:
        name = mismatches[0]
        return Outcome("fails", f"not run; it expects {name} of {expected_shapes[name]}, the folder has {shapes.get(name)}")
    return Outcome(
        "not run", f"expectations checked: {len(expected_shapes)} weights have the shapes that it builds from the config"
    )


def _llama(head_size: Callable[[Config], int]) -> Callable[[Config], Shapes]:
    """Return a function that gives the shapes of a Llama's weights. `head_size` gives the channels of a head."""

    def shapes(config: Config) -> Shapes:
        width, neurons, size = config["hidden_size"], config["intermediate_size"], head_size(config)
        heads, groups = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
        expected: Shapes = {"model.embed_tokens.weight": [config["vocab_size"], width], "model.norm.weight": [width]}
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            expected |= {
                f"{prefix}.self_attn.q_proj.weight": [heads, width],
                f"{prefix}.self_attn.o_proj.weight": [width, heads],
            }
            expected |= {f"{prefix}.self_attn.{name}_proj.weight": [groups, width] for name in "kv"}
            expected |= {f"{prefix}.mlp.{name}_proj.weight": [neurons, width] for name in ("gate", "up")}
            expected |= {f"{prefix}.mlp.down_proj.weight": [width, neurons]}
        return expected

    return shapes


def _bert(config: Config) -> Shapes:
    """Return the shapes of a BERT classifier's weights."""
    width, neurons = config["hidden_size"], config["intermediate_size"]
    size = width // config["num_attention_heads"] * config["num_attention_heads"]
    expected: Shapes = {"bert.embeddings.word_embeddings.weight": [config["vocab_size"], width]}
    expected |= {"bert.pooler.dense.weight": [width, width], "classifier.weight": [len(config["id2label"]), width]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"bert.encoder.layer.{layer}"
        expected |= {f"{prefix}.attention.self.{name}.weight": [size, width] for name in ("query", "key", "value")}
        expected |= {f"{prefix}.attention.output.dense.weight": [width, size]}
        expected |= {f"{prefix}.intermediate.dense.weight": [neurons, width], f"{prefix}.output.dense.weight": [width, neurons]}
    return expected


def _t5(config: Config) -> Shapes:
    """Return the shapes of a T5's weights."""
    width, neurons, inner = config["d_model"], config["d_ff"], config["num_heads"] * config["d_kv"]
    expected: Shapes = {}
    for stack, layers in (("encoder", config["num_layers"]), ("decoder", config["num_decoder_layers"])):
        kinds = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
        for layer in range(layers):
            prefix = f"{stack}.block.{layer}.layer"
            for number, kind in enumerate(kinds):
                expected |= {f"{prefix}.{number}.{kind}.{name}.weight": [inner, width] for name in "qkv"}
                expected |= {f"{prefix}.{number}.{kind}.o.weight": [width, inner]}
            expected |= {f"{prefix}.{len(kinds)}.DenseReluDense.wo.weight": [width, neurons]}
    return expected
