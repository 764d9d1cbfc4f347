"""The `per_layer_config` of a folder: transformers reads the sizes of each layer from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, emptied_plan, uneven_plan, uniform_plan
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

import secateur
from secateur.model.discovery import fingerprint
from secateur.pruning.prune import prune

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


def saved(name: str, plan: secateur.Plan, folder: Path) -> tuple[nn.Module, Any]:
    """Prune a case's model and save it. Return the pruned model, and the config that transformers reads from the folder."""
    pruned = prune(CASES[name].model(), plan).eval()
    secateur.save(pruned, folder)
    return pruned, AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", DECODERS)
def test_a_model_of_layers_built_from_the_config_computes_the_same(name: str, tmp_path: Path) -> None:
    pruned, config = saved(name, uneven_plan(CASES[name], "head"), tmp_path / "small")
    assert config.per_layer_attributes  # Layers differ.
    dense = CASES[name].model().eval()
    layers = dense.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    for number, layer in enumerate(layers):
        resolved = config.per_layer_config[number]
        resolved._attn_implementation = dense.config._attn_implementation  # type: ignore[union-attr]
        layers[number] = type(layer)(resolved, number).eval()
    missing, unexpected = dense.load_state_dict(load_file(tmp_path / "small" / "model.safetensors"), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    inputs = {"input_ids": torch.arange(4, 12).reshape(2, 4)}
    with torch.inference_mode():
        torch.testing.assert_close(dense(**inputs).logits, pruned(**inputs).logits)


@pytest.mark.parametrize(("name", "described"), [("mistral", True), ("qwen3", True), ("llama", False)])
def test_heads_by_layer_are_described_where_transformers_can_read_them(name: str, described: bool, tmp_path: Path) -> None:
    """LlamaConfig of transformers 5.23 refuses layers with other numbers of heads, so that the folder would not load."""
    model = CASES[name].model()
    sites = tuple(secateur.sites(model))
    kept = {site.name: torch.arange(site.units if site.layer or not site.is_head else 1) for site in sites}
    pruned, config = saved(name, secateur.Plan(kept, sites, fingerprint(model)), tmp_path / "small")
    assert config.is_heterogeneous == described
    if described:
        layers: Any = pruned.get_submodule("model.layers")
        for layer, resolved in zip(layers, config.per_layer_config, strict=True):
            assert resolved.num_key_value_heads * resolved.head_dim == layer.self_attn.k_proj.out_features
            assert resolved.num_attention_heads * resolved.head_dim == layer.self_attn.q_proj.out_features
    assert secateur.load(tmp_path / "small")


@pytest.mark.parametrize("name", DECODERS)
def test_a_layer_without_a_branch_skips_it(name: str, tmp_path: Path) -> None:
    pruned, config = saved(name, emptied_plan(CASES[name], "head"), tmp_path / "small")
    layers: Any = pruned.get_submodule("model.layers")
    for number, layer in enumerate(layers):
        resolved = config.per_layer_config[number]
        assert ("mlp" in resolved.skip) == (layer.mlp.down_proj.in_features == 0)
        assert ("attention" in resolved.skip) == (layer.self_attn.o_proj.in_features == 0)
        if "mlp" not in resolved.skip:
            assert resolved.intermediate_size == layer.mlp.down_proj.in_features
    assert any(resolved.skip for resolved in config.per_layer_config)


def test_a_loaded_model_has_an_ordinary_config_and_writes_the_fields_again(tmp_path: Path) -> None:
    saved("llama", uneven_plan(CASES["llama"], "head"), tmp_path / "small")
    loaded = secateur.load(tmp_path / "small")
    assert loaded.config.num_attention_heads  # type: ignore[union-attr]  # Transformers refuses this of a config with layers.
    secateur.save(loaded, tmp_path / "again")
    first, second = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("small", "again"))
    assert first["per_layer_config"] == second["per_layer_config"]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("t5-gated", uneven_plan(CASES["t5-gated"], "head")),  # Two stacks.
        ("llama", uneven_plan(CASES["llama"], "channel")),
        ("bert-sequence", uneven_plan(CASES["bert-sequence"], "head")),  # Its config says no size of a head.
        ("gpt2", emptied_plan(CASES["gpt2"], "head")),  # The bias of an empty branch stays.
        ("llama", uniform_plan(CASES["llama"], "head")),  # A stock config says it.
    ],
)
def test_other_folders_have_none(name: str, plan: secateur.Plan, tmp_path: Path) -> None:
    saved(name, plan, tmp_path / "small")
    assert "per_layer_config" not in json.loads((tmp_path / "small" / "config.json").read_text())
