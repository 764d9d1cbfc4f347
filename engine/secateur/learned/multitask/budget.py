"""Choice of the entries (elements or ranks) that a density keeps, in each matrix or over all matrices."""

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
    """Check that a density can be reached.

    Args:
        masks: The masks by linear layer.
        scope: "global" or "local".
        density: The share of the linear layers' weights to keep, in (0, 1].

    Raises:
        InputError: The density is out of range or too low. The least density keeps one element; with ranks and local scope, one
            rank of each matrix; with ranks and global scope, one rank of any matrix. The message names it, rounded up to three
            digits.
    """
    if not 0 < density <= 1:
        raise InputError(f"density: expected a share of the encoder's weights in (0, 1], got {density}")
    one_entry = [mask.stored(1) for mask in masks.values()]  # the weights of one entry of each matrix
    by_rank = any(isinstance(mask, RankMask) for mask in masks.values())
    fewest = sum(one_entry) if by_rank and scope == "local" else max(one_entry)
    if _budget(masks, density) < fewest:
        nearest = _rounded_up(fewest / sum(mask.weights for mask in masks.values()))
        kept = ("one rank of each matrix" if scope == "local" else "one rank") if by_rank else "one element"
        raise InputError(f"density: expected at least {nearest:.3g}, the nearest that keeps {kept}, got {density}")


def choose(masks: Masks, importance: Mapping[str, Tensor], scope: Scope, density: float, remaining: float) -> dict[str, Tensor]:
    """Choose the entries of each matrix that stay, the most important ones.

    With local scope, every matrix keeps the same share of its elements or ranks. With global scope, the entries of all matrices
    are ranked together.

    Args:
        masks: The masks by linear layer.
        importance: The importance of the entries of each matrix, floating point [entries].
        scope: "global" or "local".
        density: The final share of the weights to keep, in (0, 1].
        remaining: The share of the weights to prune that is not pruned yet, from 1 to 0. At 0 the density is met: exactly with
            elements; with ranks, as many of them stay as fit.

    Returns:
        For each matrix a mask, bool [entries], True where an entry stays.
    """
    if scope == "local":
        final = _local_counts(masks, density)
        return {
            name: largest(importance[name], _count_at(final[name], mask.entries, remaining)) for name, mask in masks.items()
        }
    all_importance = torch.cat([importance[name] for name in masks])  # [entries of all matrices]
    if all(isinstance(mask, ElementMask) for mask in masks.values()):
        chosen = largest(all_importance, _count_at(_budget(masks, density), all_importance.numel(), remaining))
    else:
        order = all_importance.argsort(descending=True, stable=True)
        final_count = int((_stored_by_prefix(masks, order) <= _budget(masks, density)).sum())
        chosen = torch.zeros_like(all_importance, dtype=torch.bool)
        chosen[order[: _count_at(final_count, all_importance.numel(), remaining)]] = True
    parts = torch.split(chosen, [mask.entries for mask in masks.values()])
    return dict(zip(masks, parts, strict=True))


def _budget(masks: Masks, density: float) -> int:
    """Convert a density to a number of weights."""
    return round(density * sum(mask.weights for mask in masks.values()))


def _rounded_up(share: float) -> float:
    """Round a share up to three digits, so that the printed density can be reached."""
    scale = 10.0 ** (2 - math.floor(math.log10(share)))
    return math.ceil(share * scale) / scale


def _count_at(final: int, total: int, remaining: float) -> int:
    """Count the entries that stay while `remaining` of the entries to prune are still there."""
    return final + round((total - final) * remaining)


def _local_counts(masks: Masks, density: float) -> dict[str, int]:
    """Count the entries of each matrix that stay in the end, with local scope."""
    sizes = [mask.entries for mask in masks.values()]
    if all(isinstance(mask, ElementMask) for mask in masks.values()):
        # Rounding the running sums makes the counts add up to the density's total.
        ends = [0, *(round(density * end) for end in accumulate(sizes))]
        counts = [high - low for low, high in pairwise(ends)]
    else:
        # Try every share at which some matrix gets one more rank; take the largest share that fits the budget.
        budget, counts = _budget(masks, density), [1] * len(sizes)
        for share in sorted({rank / size for size in sizes for rank in range(1, size + 1)}):
            candidate = [max(1, int(share * size + 1e-9)) for size in sizes]
            if sum(mask.stored(count) for mask, count in zip(masks.values(), candidate, strict=True)) > budget:
                break
            counts = candidate
    return dict(zip(masks, counts, strict=True))


def _stored_by_prefix(masks: Masks, order: Tensor) -> Tensor:
    """Count the stored weights if the first 1, 2, ... of the ordered ranks stay, int64 [ranks of all matrices]."""
    costs = torch.empty(len(order), dtype=torch.int64, device=order.device)
    # The number of the matrix that each of the ordered ranks belongs to, int64 [ranks of all matrices].
    owner = torch.repeat_interleave(
        torch.arange(len(masks), device=order.device),
        torch.tensor([mask.entries for mask in masks.values()], device=order.device),
    )[order]
    for number, mask in enumerate(masks.values()):
        stored = torch.tensor([mask.stored(kept) for kept in range(mask.entries + 1)], device=order.device)  # [ranks + 1]
        costs[owner == number] = stored.diff()
    return costs.cumsum(0)
