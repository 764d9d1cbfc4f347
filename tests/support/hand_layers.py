"""Layer gates and deleted blocks made by hand, at hand-written paths of modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import naive
from cases import Case
from torch import nn


def places(case: Case, name: str) -> tuple[str, str]:
    """Return the hand-written paths of the module whose output a branch adds, and of its block."""
    stack, layer, kind = name.split(".")
    if case.kind == "encoder-decoder" and case.name not in ("bart", "marian"):
        parts = ["self_attention", "cross_attention", "ffn"] if stack == "decoder" else ["self_attention", "ffn"]
        inner = {"self_attention": "SelfAttention.o", "cross_attention": "EncDecAttention.o", "ffn": "DenseReluDense.wo"}[kind]
        return f"{stack}.block.{layer}.layer.{parts.index(kind)}.{inner}", f"{stack}.block.{layer}"
    if case.kind == "encoder-decoder":
        path = f"model.{stack}.layers.{layer}"
        inner = {"self_attention": "self_attn.out_proj", "cross_attention": "encoder_attn.out_proj", "ffn": "fc2"}[kind]
        return f"{path}.{inner}", path
    layers, attention, down = naive.BLOCKS[model_type(case)]
    path = f"{layers}.{layer}"
    if case.name in ("gemma2", "gemma3"):
        return f"{path}.post_{'attention' if kind == 'self_attention' else 'feedforward'}_layernorm", path
    return f"{path}.{attention[-1] if kind == 'self_attention' else down}", path


def model_type(case: Case) -> str:
    config: Any = case.build().config
    return str(config.model_type)


def branch_names(case: Case, model: Any) -> list[str]:
    return list(naive.gates(case, model, "head"))


@contextmanager
def by_hand(case: Case, model: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Multiply branches by their values (numbers or tensors) with hooks. The names are those of blocks or of branches."""
    handles = []
    for branch in branch_names(case, model):
        value = values.get(branch, values.get(branch.rpartition(".")[0], 1.0))
        module = model.get_submodule(places(case, branch)[0])
        handles.append(module.register_forward_hook(lambda m, a, out, v=value: out * v))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def deleted_by_hand(case: Case, model: nn.Module, removed: list[str]) -> Any:
    """Return a copy of the model without some items of its lists of blocks."""
    smaller: Any = copy.deepcopy(model)
    for name in sorted(removed, reverse=True):
        layers, _, number = places(case, f"{name}.ffn")[1].rpartition(".")
        of_stack, k = smaller.get_submodule(layers), int(number)
        if getattr(smaller.config, "layer_types", None) is not None:
            smaller.config.layer_types = smaller.config.layer_types[:k] + smaller.config.layer_types[k + 1 :]
        gone = of_stack[k]
        del of_stack[k]
        if k == 0 and hasattr(gone, "layer"):  # T5's first block makes the position bias for the others.
            attention = of_stack[0].layer[0].SelfAttention
            attention.relative_attention_bias = gone.layer[0].SelfAttention.relative_attention_bias
            attention.has_relative_attention_bias = True
    return smaller
