"""Shapes: which numbers of units an engine can load, as a constraint on the numbers that sites keep."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from secateur.attribution.scores import Scores
from secateur.model.sites import Site
from secateur.planning.allocation import Ladder
from secateur.support.errors import InputError

Shape = Literal["any", "per-layer", "uniform", "stock"]
# The cost of a model in which each site keeps so many units.
Cost = Callable[[Mapping[str, int]], float]


def require_shape(shape: str, sites: Sequence[Site], allocation: str, *, per_head: bool) -> None:
    """Check that sites can have a shape.

    Args:
        shape: The shape.
        sites: The sites.
        allocation: The allocation.
        per_head: As in `plan`.

    Raises:
        InputError: The shape is unknown; it is another than "any" and units are channels of heads; or the allocation spreads
            a budget over sites that must stay alike.
    """
    known = ("any", "per-layer", "uniform", "stock")
    if shape not in known:
        raise InputError(f"shape: expected one of {', '.join(known)}, got {shape!r}")
    channels = next((site.name for site in sites if site.is_channel), None)
    if shape != "any" and (channels is not None or per_head):
        raise InputError(f"shape: expected any with channels of heads, which no engine loads, got {shape!r} and {channels!r}")
    if shape in ("uniform", "stock") and allocation != "uniform":
        raise InputError(f"allocation: expected uniform with shape {shape}, whose layers are alike, got {allocation!r}")


def whole_or_absent(of_sites: Sequence[Ladder]) -> list[Ladder]:
    """Return the ladders where each attention keeps all its heads or none. FFN ladders stay."""
    return [_rungs(ladder, [0, len(ladder.counts) - 1]) if ladder.site.is_head else ladder for ladder in of_sites]


def _rungs(ladder: Ladder, rungs: Sequence[int]) -> Ladder:
    """A ladder with some of its rungs. The lowest one stays only where it has no units."""
    kept = sorted({rung for rung in rungs if rung == len(ladder.counts) - 1 or not ladder.counts[rung]})
    prices, attribution = ([values[rung] for rung in kept] for values in (ladder.prices, ladder.attribution))
    return Ladder(ladder.site, [ladder.counts[rung] for rung in kept], prices, attribution)


def shared(scores: Scores) -> Scores:
    """Return scores under which heads that must be the same in all layers of a stack have their mean score in each of them."""
    stacks: dict[str, list[Site]] = {}
    for site in scores.sites:
        if site.in_stock == "shared":
            stacks.setdefault(f"{site.stack} {site.units}", []).append(site)
    means = {
        site.name: torch.stack([scores[other.name] for other in sites]).mean(0)  # [heads]
        for sites in stacks.values()
        for site in sites
    }
    return replace(scores, by_site={**scores.by_site, **means})


def alike(
    of_sites: Sequence[Ladder], gone: Collection[str], cost: Cost, limit: float, *, stock: bool
) -> list[tuple[float, dict[str, int]]]:
    """Return the models within a limit whose layers are alike: one FFN width, one number of heads.

    Args:
        of_sites: The ladders.
        gone: The names of sites that keep no unit.
        cost: The cost of a model.
        limit: The highest cost.
        stock: Whether the config of the model's own class must say the number of heads.

    Returns:
        For each number of heads with which an FFN width fits, the attribution that the model with the widest FFN keeps, and the
        number of units of each site. The most attribution comes first.

    Raises:
        InputError: The sites have no number of units in common.
    """
    staying = [ladder for ladder in of_sites if ladder.site.name not in gone]
    heads, neurons = ([ladder for ladder in staying if ladder.site.is_head is is_head] for is_head in (True, False))
    models = []
    for number in _common(heads, whole=stock and any(ladder.site.in_stock == "whole" for ladder in heads)):
        widths = _common(neurons, whole=False)

        def counts(width: int, number: int = number) -> dict[str, int]:
            of_staying = {ladder.site.name: number if ladder.site.is_head else width for ladder in staying}
            return {ladder.site.name: of_staying.get(ladder.site.name, 0) for ladder in of_sites}

        fitting = bisect_right(widths, limit, key=lambda width: cost(counts(width)))
        if fitting:
            units = counts(widths[fitting - 1])
            kept = sum(ladder.attribution[ladder.counts.index(units[ladder.site.name])] for ladder in staying)
            models.append((kept, units))
    return sorted(models, key=lambda model: -model[0])


def _common(of_sites: Sequence[Ladder], *, whole: bool) -> list[int]:
    """The numbers of units, but for none, that all of some ladders have, ascending; 0 alone for no ladder."""
    if not of_sites:
        return [0]
    numbers = set.intersection(*({ladder.counts[-1]} if whole else set(ladder.counts) for ladder in of_sites)) - {0}
    if not numbers:
        names = ", ".join(f"{ladder.site.name} {ladder.site.units}" for ladder in of_sites[:3])
        raise InputError(f"shape: expected sites with a number of units in common, got other widths: {names}, ...")
    return sorted(numbers)
