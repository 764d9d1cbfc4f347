"""What servers that can't run here expect of a folder, read in their sources, and whether it is so."""

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
    """vllm/model_executor/models, llama.py and bert.py: one width for all layers, from the config; head_dim may stand there."""
    expected = {"llama": _llama(lambda c: c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]), "bert": _bert}
    return _checked(folder, expected[folder.family])


def text_embeddings_inference(folder: Folder) -> Outcome:
    """backends/candle/src/models/bert.rs of text-embeddings-inference 1.9.3: a head has hidden size / heads channels."""
    return _checked(folder, _bert)


def text_generation_inference(folder: Folder) -> Outcome:
    """server/.../flash_llama_modeling.py and t5_modeling.py: Llama's head has hidden size / heads channels, T5's d_kv."""
    return _checked(folder, {"llama": _llama(lambda c: c["hidden_size"] // c["num_attention_heads"]), "t5": _t5}[folder.family])


def _checked(folder: Folder, expected: Callable[[Config], Shapes]) -> Outcome:
    """The weights' shapes against what the server would build out of the config."""
    config = json.loads((folder.model / "config.json").read_text())
    if "auto_map" in config:
        return Outcome("fails", "not run; its own class can't have this shape: the config needs the folder's modelling file")
    with safe_open(folder.model / "model.safetensors", "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    wanted = expected(config)
    wrong = [name for name, shape in wanted.items() if found.get(name) != shape]
    if wrong:
        name = wrong[0]
        return Outcome("fails", f"not run; it expects {name} of {wanted[name]}, the folder has {found.get(name)}")
    return Outcome("not run", f"expectations checked: {len(wanted)} weights have the shapes that it builds from the config")


def _llama(head_size: Callable[[Config], int]) -> Callable[[Config], Shapes]:
    def shapes(config: Config) -> Shapes:
        width, neurons, size = config["hidden_size"], config["intermediate_size"], head_size(config)
        heads, groups = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
        found: Shapes = {"model.embed_tokens.weight": [config["vocab_size"], width], "model.norm.weight": [width]}
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            found |= {f"{at}.self_attn.q_proj.weight": [heads, width], f"{at}.self_attn.o_proj.weight": [width, heads]}
            found |= {f"{at}.self_attn.{name}_proj.weight": [groups, width] for name in "kv"}
            found |= {f"{at}.mlp.{name}_proj.weight": [neurons, width] for name in ("gate", "up")}
            found |= {f"{at}.mlp.down_proj.weight": [width, neurons]}
        return found

    return shapes


def _bert(config: Config) -> Shapes:
    width, neurons = config["hidden_size"], config["intermediate_size"]
    size = width // config["num_attention_heads"] * config["num_attention_heads"]
    found: Shapes = {"bert.embeddings.word_embeddings.weight": [config["vocab_size"], width]}
    found |= {"bert.pooler.dense.weight": [width, width], "classifier.weight": [len(config["id2label"]), width]}
    for layer in range(config["num_hidden_layers"]):
        at = f"bert.encoder.layer.{layer}"
        found |= {f"{at}.attention.self.{name}.weight": [size, width] for name in ("query", "key", "value")}
        found |= {f"{at}.attention.output.dense.weight": [width, size]}
        found |= {f"{at}.intermediate.dense.weight": [neurons, width], f"{at}.output.dense.weight": [width, neurons]}
    return found


def _t5(config: Config) -> Shapes:
    width, neurons, inner = config["d_model"], config["d_ff"], config["num_heads"] * config["d_kv"]
    found: Shapes = {}
    for stack, layers in (("encoder", config["num_layers"]), ("decoder", config["num_decoder_layers"])):
        kinds = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
        for layer in range(layers):
            at = f"{stack}.block.{layer}.layer"
            for number, kind in enumerate(kinds):
                found |= {f"{at}.{number}.{kind}.{name}.weight": [inner, width] for name in "qkv"}
                found |= {f"{at}.{number}.{kind}.o.weight": [width, inner]}
            found |= {f"{at}.{len(kinds)}.DenseReluDense.wo.weight": [width, neurons]}
    return found
