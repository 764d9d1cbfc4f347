"""What a plan and a model cost: parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.site import Site


def parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """FLOPs of one forward pass as torch counts them (matrix products and attention; a multiply-add is two)."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


def unit_cost(site: Site, kind: str, tokens: Mapping[str, float]) -> float:
    """What one unit of a site costs: weights ("params"), or multiply-adds x 2 for one example of mean length ("flops")."""
    if kind == "params":
        return site.parameters
    own, source = tokens[site.stack], tokens["encoder"]
    keys = source if site.kind == "cross_attention" else own
    return site.flops * own + site.source_flops * source + site.core_flops * own * keys


def remaining(
    layers: Sequence[Site], sites: Sequence[Site], counts: Mapping[str, int], kind: str, tokens: Mapping[str, float]
) -> float:
    """The share of the layers' cost that remains when each site keeps `counts` units.

    Channels are counted by their weights: what they save in the attention itself depends on how they lie in the heads.
    """
    total = sum(unit_cost(site, kind, tokens) * site.units for site in layers)
    removed = sum(unit_cost(site, kind, tokens) * (site.units - counts[site.name]) for site in sites)
    return 1 - removed / total
