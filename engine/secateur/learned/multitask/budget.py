"""What a density leaves of each weight: numbers of elements or ranks, in each matrix or over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from secateur.learned.multitask.parametrizations import ElementMask, Mask, RankMask
from secateur.learned.multitask.top_k import largest
from secateur.support.errors import InputError

Scope = Literal["global", "local"]
Masks = Mapping[str, Mask]


def require_reachable(masks: Masks, scope: Scope, density: float) -> None:
    """Raises InputError, with the nearest density, where the asked one keeps no element, or not one rank: of each matrix
    (local), or of whichever comes first (global)."""
    if not 0 < density <= 1:
        raise InputError(f"density: expected a share of the encoder's weights in (0, 1], got {density}")
    least = [mask.stored(1) for mask in masks.values()]
    rank = any(isinstance(mask, RankMask) for mask in masks.values())
    fewest = sum(least) if rank and scope == "local" else max(least)
    if _budget(masks, density) < fewest:
        nearest = _rounded_up(fewest / sum(mask.weights for mask in masks.values()))
        what = ("one rank of each matrix" if scope == "local" else "one rank") if rank else "one element"
        raise InputError(f"density: expected at least {nearest:.3g}, the nearest that keeps {what}, got {density}")


def choose(masks: Masks, importance: Mapping[str, Tensor], scope: Scope, density: float, remaining: float) -> dict[str, Tensor]:
    """Which entries of each matrix stay, bool [entries] by name.

    importance: [entries] by name. remaining: the share of what the density takes away that is still there. At 0 the density is
    met: by elements exactly, by ranks with the most of them that fit. Within local scope each matrix keeps the same share of
    its elements, or of its ranks; within global scope all matrices' entries are ranked together.
    """
    if scope == "local":
        final = _local(masks, density)
        return {name: largest(importance[name], _still(final[name], mask.entries, remaining)) for name, mask in masks.items()}
    every = torch.cat([importance[name] for name in masks])
    if all(isinstance(mask, ElementMask) for mask in masks.values()):
        chosen = largest(every, _still(_budget(masks, density), every.numel(), remaining))
    else:
        order = every.argsort(descending=True, stable=True)
        final_count = int((_stored_by_prefix(masks, order) <= _budget(masks, density)).sum())
        chosen = torch.zeros_like(every, dtype=torch.bool)
        chosen[order[: _still(final_count, every.numel(), remaining)]] = True
    parts = torch.split(chosen, [mask.entries for mask in masks.values()])
    return dict(zip(masks, parts, strict=True))


def _budget(masks: Masks, density: float) -> int:
    return round(density * sum(mask.weights for mask in masks.values()))


def _rounded_up(share: float) -> float:
    """To three digits, so that what is told can be reached."""
    scale = 10.0 ** (2 - math.floor(math.log10(share)))
    return math.ceil(share * scale) / scale


def _still(final: int, total: int, remaining: float) -> int:
    return final + round((total - final) * remaining)


def _local(masks: Masks, density: float) -> dict[str, int]:
    """How many entries of each matrix stay in the end."""
    sizes = [mask.entries for mask in masks.values()]
    if all(isinstance(mask, ElementMask) for mask in masks.values()):
        # Rounded so that the sum is what the density says.
        ends = [0, *(round(density * end) for end in accumulate(sizes))]
        counts = [high - low for low, high in pairwise(ends)]
    else:
        # Every share at which some matrix gets one rank more; the largest within the budget.
        budget, counts = _budget(masks, density), [1] * len(sizes)
        for share in sorted({rank / size for size in sizes for rank in range(1, size + 1)}):
            more = [max(1, int(share * size + 1e-9)) for size in sizes]
            if sum(mask.stored(count) for mask, count in zip(masks.values(), more, strict=True)) > budget:
                break
            counts = more
    return dict(zip(masks, counts, strict=True))


def _stored_by_prefix(masks: Masks, order: Tensor) -> Tensor:
    """How many weights are stored when the first 1, 2, ... of the ordered ranks stay [ranks]."""
    costs = torch.empty(len(order), dtype=torch.int64, device=order.device)
    owner = torch.repeat_interleave(
        torch.arange(len(masks), device=order.device),
        torch.tensor([mask.entries for mask in masks.values()], device=order.device),
    )[order]
    for number, mask in enumerate(masks.values()):
        stored = torch.tensor([mask.stored(kept) for kept in range(mask.entries + 1)], device=order.device)
        costs[owner == number] = stored.diff()
    return costs.cumsum(0)
