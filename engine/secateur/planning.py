"""plan: which units stay, under a budget. Pure functions of scores."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from secateur import cost
from secateur.allocation import Allocation, Ladder, greedy, ladders, ranks, uniform
from secateur.errors import InputError
from secateur.files import write_atomically
from secateur.scores import Scores
from secateur.site import Site

FORMAT = "secateur-plan/1"
_ROUNDING = 1e-12  # Of sums of shares.


@dataclass(frozen=True)
class Plan(Mapping[str, Tensor]):
    """plan[site name]: the units that stay, sorted int64, or none. budget: what was asked for, and what the plan comes to."""

    kept: dict[str, Tensor]
    sites: tuple[Site, ...]
    fingerprint: str
    budget: dict[str, Any]

    def __getitem__(self, site: str) -> Tensor:
        return self.kept[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def dumps(self) -> str:
        """JSON of a few kB: the kept units of a site are a bit mask in base64, lowest unit first."""
        stay = {site.name: {"stay": len(self[site.name]), "mask": _mask(self[site.name], site.units)} for site in self.sites}
        sites = [{**site.to_json(), **stay[site.name]} for site in self.sites]
        about = {"format": FORMAT, "fingerprint": self.fingerprint, "budget": self.budget, "sites": sites}
        return json.dumps(about, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes `dumps` to a file."""
        write_atomically(path, self.dumps())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what `save` wrote. Raises InputError for anything else."""
        if not Path(path).is_file():
            raise InputError(f"plan: no such file: {str(path)!r}")
        try:
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise InputError(f"plan: expected the format {FORMAT!r} in {str(path)!r}, got {about['format']!r}")
            kept, sites = {}, []
            for entry in about["sites"]:
                mask, stay = entry.pop("mask"), entry.pop("stay")
                site = Site(**entry)
                kept[site.name] = _unmask(mask, site.units)
                sites.append(site)
                if len(kept[site.name]) != stay:
                    raise InputError(
                        f"plan: {str(path)!r} is corrupted: {site.name} says {stay} units and marks {len(kept[site.name])}"
                    )
            return cls(kept, tuple(sites), about["fingerprint"], about["budget"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"plan: {str(path)!r} is not a plan file ({type(error).__name__}: {error})") from error


def plan(
    scores: Scores,
    *,
    keep: float | None = None,
    flops: float | None = None,
    params: float | None = None,
    allocation: Allocation = "uniform",
    floor: float = 0.0,
    align: int = 1,
    per_head: bool = False,
) -> Plan:
    """The units with the highest scores of each site, as many as the budget allows; ties go to the lower index.

    Exactly one budget. keep: the share of units that stays at every site (a fraction of a unit counts as one). flops, params:
    the share of the multiply-adds, or weights, of the model's layers that may remain (FLOPs at the mean length of the scored
    examples), met to within one unit.
    allocation: how flops and params are spread over the sites. "uniform": one share for all, as Yang et al. 2023 have it;
    "global": the units with the highest scores of all sites; "knapsack": those that keep the most attribution for what they
    cost, with `budget["gap"]` saying how far the attribution may be from the optimum, as a share of it. floor: the share of
    its units that every site keeps at least, one at least.
    align: FFN widths are multiples of it, and with per_head the channels of a head of it or of 8, if that is less; rounded up
    under a keep budget, and down otherwise. per_head: channels are ranked within each head, the same number for each, so that
    heads stay alike. Raises InputError: no budget or several, one out of range, one that cannot be met; the message says what
    can.
    """
    name, value = the_budget(keep=keep, flops=flops, params=params)
    _check(name, allocation, floor, align)
    kind = "flops" if name == "keep" else name
    total = sum(cost.unit_cost(site, kind, scores.tokens) * site.units for site in scores.layers)

    def price(site: Site, count: int) -> float:
        return cost.unit_cost(site, kind, scores.tokens) * count / total

    found = ladders(scores, price, align, per_head, floor)
    if name == "keep":
        rungs, gap = [ladder.at(value) for ladder in found], 0.0
    else:
        rungs, gap = _within(found, name, value, 1 - sum(ladder.prices[-1] for ladder in found), allocation)
    counts = {ladder.site.name: ladder.counts[rung] for ladder, rung in zip(found, rungs, strict=True)}
    kept = {site.name: _highest(scores[site.name], counts[site.name], site, per_head) for site in scores.sites}
    remaining = {k: cost.remaining(scores.layers, scores.sites, counts, k, scores.tokens) for k in ("flops", "params")}
    how = {"allocation": allocation, "floor": floor, "gap": gap, "align": align}
    return Plan(kept, scores.sites, scores.fingerprint, {name: value, **how, "remaining": remaining})


def the_budget(**budgets: float | None) -> tuple[str, float]:
    """Name and value of the one budget that is given. Raises InputError: none or several, or one out of (0, 1]."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise InputError(f"budget: expected exactly one of {', '.join(budgets)}, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not 0 < value <= 1:
        raise InputError(f"{name}: expected a number in (0, 1], got {value}")
    return name, value


def _check(budget: str, allocation: str, floor: float, align: int) -> None:
    if align < 1:
        raise InputError(f"align: expected a positive number, got {align}")
    if not 0 <= floor <= 1:
        raise InputError(f"floor: expected a number in [0, 1], got {floor}")
    if allocation not in get_args(Allocation):
        raise InputError(f"allocation: expected one of {', '.join(get_args(Allocation))}, got {allocation!r}")
    if budget == "keep" and allocation != "uniform":
        raise InputError(f"allocation: expected uniform with keep, which is one share for all sites, got {allocation!r}")


def _within(found: Sequence[Ladder], name: str, value: float, rest: float, allocation: Allocation) -> tuple[list[int], float]:
    """Rungs whose cost, with the rest of the layers, is at most `value`; and the gap to the best, where it is known."""
    smallest = rest + sum(ladder.prices[0] for ladder in found)
    if smallest > value + _ROUNDING:
        raise InputError(
            f"{name}: expected at least {smallest:.4f}, what is left with the least at each chosen site, got {value}"
        )
    limit = value - rest + _ROUNDING
    return (uniform(found, limit), 0.0) if allocation == "uniform" else greedy(found, limit, by_price=allocation == "knapsack")


def _highest(scores: Tensor, count: int, site: Site, per_head: bool) -> Tensor:
    order = ranks(scores, site, per_head)
    first = torch.arange(len(order)).unsqueeze(1) * (site.units // len(order))
    return (order[:, : count // len(order)] + first).flatten().sort().values


def _mask(kept: Tensor, units: int) -> str:
    bits = torch.zeros(-(-units // 8) * 8, dtype=torch.int64)
    bits[kept] = 1
    packed = (bits.view(-1, 8) << torch.arange(8)).sum(1)
    return base64.b64encode(bytes(packed.tolist())).decode()


def _unmask(text: str, units: int) -> Tensor:
    packed = torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.int64)
    bits = (packed.unsqueeze(1) >> torch.arange(8)) & 1
    kept = bits.flatten().nonzero().flatten()
    last = int(kept[-1]) if len(kept) else -1
    if len(packed) != -(-units // 8) or last >= units:
        raise InputError(f"plan: expected a mask of {units} units, got {len(packed)} bytes whose last mark is {last}")
    return kept
