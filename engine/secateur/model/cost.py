"""Costs of models and plans: parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.model.offloading import named_parameters
from secateur.model.sites import Site


def parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters, tied ones once."""
    return sum(parameter.numel() for _, parameter in named_parameters(model))


def flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Return the FLOPs of the matrix products of one forward pass, 2 for a multiply-add.

    Attention's core is included. Element-wise work is not counted. A causal or windowed core counts in full, so that every
    implementation of attention gives the same number.

    Args:
        model: The model.
        inputs: The keyword arguments of its forward pass.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_CORES)
    with counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


def _core_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the FLOPs of attention's two products from the shapes [B, heads, T, channels] of queries, keys and values.

    Each query head reads one key-value head. Values may have another number of channels than keys.
    """
    batch, heads, tokens, channels = query
    return 2 * batch * heads * tokens * key[2] * (channels + value[3])


# Torch's counter has no formula for the CPU's fused kernel and counts it as nothing. In older releases its formula for the
# GPU's kernels refuses fewer key-value heads than query heads.
_CORES: dict[Any, Any] = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}"): _core_flops
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
}


def unit_cost(site: Site, kind: str, tokens: Mapping[str, float]) -> float:
    """Return the cost of one unit of a site.

    For heads and neurons it is exactly what `flops` counts less of a batch without padding once the unit is gone. Channels of
    an attention count with their weights alone: what they save in its core depends on how they lie in the heads.

    Args:
        site: The site.
        kind: "params" for weights, or "flops" for the FLOPs of one example of mean length.
        tokens: The mean number of tokens of an example by stack.
    """
    if kind == "params":
        return site.parameters
    own, source = tokens[site.stack], tokens["encoder"]
    keys = source if site.kind == "cross_attention" else own
    return site.flops * own + site.source_flops * source + site.core_flops * own * keys


def remaining(
    layers: Sequence[Site], sites: Sequence[Site], counts: Mapping[str, int], kind: str, tokens: Mapping[str, float]
) -> float:
    """Return the share of the layers' cost, by `unit_cost`, that remains when each site keeps `counts` units."""
    total = sum(unit_cost(site, kind, tokens) * site.units for site in layers)
    removed = sum(unit_cost(site, kind, tokens) * (site.units - counts[site.name]) for site in sites)
    return 1 - removed / total
