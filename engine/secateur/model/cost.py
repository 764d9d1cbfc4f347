"""What a plan and a model cost: parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.model.offloading import named_parameters
from secateur.model.sites import Site


def parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for _, parameter in named_parameters(model))


def flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """FLOPs of one forward pass: those of matrix products, a multiply-add being two, attention's core included. Element-wise
    work isn't counted. A causal or windowed core counts in full, so that every implementation of attention gives the same."""
    counter = FlopCounterMode(display=False, custom_mapping=_CORES)
    with counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


def _core_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of attention's two products, from the shapes [batch, heads, tokens, channels] of queries, keys and values. Each
    query head reads one key-value head; values may have other channels than keys."""
    batch, heads, tokens, channels = query
    return 2 * batch * heads * tokens * key[2] * (channels + value[3])


# Torch's own counter has no formula for the CPU's fused kernel, so that it counts nothing, and in older releases one for the
# GPU's that refuses fewer key-value heads than query heads.
_CORES: dict[Any, Any] = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}"): _core_flops
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
}


def unit_cost(site: Site, kind: str, tokens: Mapping[str, float]) -> float:
    """What one unit of a site costs: weights ("params"), or multiply-adds x 2 for one example of mean length ("flops").

    What goes with heads and neurons is exactly what `flops` counts less, of a batch without padding. Channels of an attention
    count with their weights alone: what they save in its core depends on how they lie in the heads.
    """
    if kind == "params":
        return site.parameters
    own, source = tokens[site.stack], tokens["encoder"]
    keys = source if site.kind == "cross_attention" else own
    return site.flops * own + site.source_flops * source + site.core_flops * own * keys


def remaining(
    layers: Sequence[Site], sites: Sequence[Site], counts: Mapping[str, int], kind: str, tokens: Mapping[str, float]
) -> float:
    """The share of the layers' cost that remains when each site keeps `counts` units, by `unit_cost`."""
    total = sum(unit_cost(site, kind, tokens) * site.units for site in layers)
    removed = sum(unit_cost(site, kind, tokens) * (site.units - counts[site.name]) for site in sites)
    return 1 - removed / total
