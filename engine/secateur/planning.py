"""plan: which units stay, under a budget. Pure functions of scores."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import cost
from secateur.errors import InputError
from secateur.files import write_atomically
from secateur.scores import Scores
from secateur.site import Site

FORMAT = "secateur-plan/1"


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
    align: int = 1,
    per_head: bool = False,
) -> Plan:
    """The units with the highest scores of each site, as many as the budget allows; ties go to the lower index.

    Exactly one budget. keep: the share of units that stays at every site (one at least; a fraction of a unit counts as
    one). flops, params: the share of the multiply-adds, or weights, of the model's layers that may remain (FLOPs at the mean
    length of the scored examples), spent at one rate for all sites and met to within one unit. align: FFN widths are multiples
    of it, and with per_head the channels of a head of it or of 8, if that is less; rounded up under a keep budget, and down
    otherwise. per_head: channels are ranked within each head, the same
    number for each, so that heads stay alike. Raises InputError: no budget or several, one out of range, one that cannot be
    met; the message says what can.
    """
    name, value = the_budget(keep=keep, flops=flops, params=params)
    if align < 1:
        raise InputError(f"align: expected a positive number, got {align}")
    if name == "keep":
        counts = {site.name: _aligned(site, value * site.units, align, per_head) for site in scores.sites}
    else:
        counts = _within(scores, name, value, align, per_head)
    kept = {site.name: _highest(scores[site.name], counts[site.name], site, per_head) for site in scores.sites}
    remaining = {k: cost.remaining(scores.layers, scores.sites, counts, k, scores.tokens) for k in ("flops", "params")}
    return Plan(kept, scores.sites, scores.fingerprint, {name: value, "align": align, "remaining": remaining})


def the_budget(**budgets: float | None) -> tuple[str, float]:
    """Name and value of the one budget that is given. Raises InputError: none or several, or one out of (0, 1]."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise InputError(f"budget: expected exactly one of {', '.join(budgets)}, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not 0 < value <= 1:
        raise InputError(f"{name}: expected a number in (0, 1], got {value}")
    return name, value


def _highest(scores: Tensor, count: int, site: Site, per_head: bool) -> Tensor:
    heads = site.groups if per_head and site.unit.endswith("channel") else 1
    order = scores.view(heads, -1).argsort(dim=1, descending=True, stable=True)[:, : count // heads]
    first = torch.arange(heads).unsqueeze(1) * (site.units // heads)
    return (order + first).flatten().sort().values


def _step(site: Site, align: int, per_head: bool) -> int:
    """Units that come or go together."""
    if site.unit == "neuron":
        return align
    return site.groups * min(align, 8) if per_head and site.unit.endswith("channel") else 1


def _aligned(site: Site, wanted: float, align: int, per_head: bool) -> int:
    step = _step(site, align, per_head)
    return min(site.units, step * max(1, math.ceil(wanted / step - 1e-9)))


def _within(scores: Scores, name: str, value: float, align: int, per_head: bool) -> dict[str, int]:
    """The largest common rate within the budget, then single steps, site after site, while one fits."""

    def remaining(counts: dict[str, int]) -> float:
        return cost.remaining(scores.layers, scores.sites, counts, name, scores.tokens)

    def at(rate: float) -> dict[str, int]:
        return {site.name: _aligned(site, rate * site.units, align, per_head) for site in scores.sites}

    smallest = remaining(at(0.0))
    if smallest > value:
        raise InputError(
            f"{name}: expected at least {smallest:.4f}, what is left with one unit at each chosen site, got {value}"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if remaining(at(middle)) <= value else (low, middle)
    counts = at(1.0) if remaining(at(1.0)) <= value else at(low)
    grown = True
    while grown:
        grown = False
        for site in sorted(scores.sites, key=lambda site: counts[site.name] / site.units):
            more = {**counts, site.name: min(site.units, counts[site.name] + _step(site, align, per_head))}
            if more != counts and remaining(more) <= value:
                counts, grown = more, True
    return counts


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
