"""Shapes: which numbers of units an engine can load, as a constraint on the numbers that sites keep."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch

from secateur.attribution.scores import Scores
from secateur.model.sites import Site
from secateur.planning.allocation import Ladder
from secateur.support.errors import InputError

Shape = Literal["any", "per-layer", "uniform", "stock"]
ALIKE: tuple[Shape, ...] = ("uniform", "stock")  # The shapes whose layers have the same numbers of units.
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
    if shape not in get_args(Shape):
        raise InputError(f"shape: expected one of {', '.join(get_args(Shape))}, got {shape!r}")
    channels = next((site.name for site in sites if site.is_channel), None)
    if shape != "any" and (channels is not None or per_head):
        raise InputError(f"shape: expected any with channels of heads, which no engine loads, got {shape!r} and {channels!r}")
    if shape in ALIKE and allocation != "uniform":
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
    whole = stock and any(ladder.site.in_stock == "whole" for ladder in heads)
    widths, by_site = _shares(neurons), [(ladder.site, ladder) for ladder in staying]
    models = []
    for share in [1.0] if whole else _shares(heads):

        def counts(width: float, share: float = share) -> dict[str, int]:
            units = {site.name: of.counts[of.at(share if site.is_head else width)] for site, of in by_site}
            return {ladder.site.name: units.get(ladder.site.name, 0) for ladder in of_sites}

        fitting = bisect_right(widths, limit, key=lambda width: cost(counts(width)))
        if fitting:
            units = counts(widths[fitting - 1])
            kept = sum(ladder.attribution[ladder.counts.index(units[ladder.site.name])] for ladder in staying)
            models.append((kept, units))
    return sorted(models, key=lambda model: -model[0])


def _shares(of_sites: Sequence[Ladder]) -> list[float]:
    """The shares of their units that some ladders can keep together, ascending; 1 alone for no ladder.

    The sites of one stack have one number of units. Those of two stacks may differ, and keep the same share, rounded up.
    """
    by_stack: dict[str, Ladder] = {}
    for ladder in of_sites:
        first = by_stack.setdefault(ladder.site.stack, ladder)
        if first.counts != ladder.counts:
            raise InputError(
                f"shape: expected sites with one number of units, got {first.site.units} at {first.site.name} and "
                f"{ladder.site.units} at {ladder.site.name}"
            )
    if not by_stack:
        return [1.0]
    finest = max(by_stack.values(), key=lambda ladder: len(ladder.counts))
    return [count / finest.site.units for count in finest.counts if count]
