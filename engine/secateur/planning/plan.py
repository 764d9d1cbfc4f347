"""plan: which units stay, under a budget. Pure functions of scores."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.attribution.scores import Scores
from secateur.model import cost
from secateur.model.sites import Site
from secateur.planning.allocation import Allocation, Ladder, Price, ladders, ranks, spread
from secateur.planning.budget import _MEASURED, check_spread, the_budget
from secateur.support.errors import InputError, reading
from secateur.support.files import write_atomically

if TYPE_CHECKING:
    from secateur.planning.latency_table import LatencyTable

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
        kept = {site.name: {"kept": len(self[site.name]), "mask": _mask(self[site.name], site.units)} for site in self.sites}
        sites = [{**site.to_json(), **kept[site.name]} for site in self.sites]
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
        with reading("plan", path, "is not a plan file"):
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise InputError(f"plan: expected the format {FORMAT!r} in {str(path)!r}, got {about['format']!r}")
            kept, sites = {}, []
            for entry in about["sites"]:
                mask, count = entry.pop("mask"), entry.pop("kept")
                site = Site(**entry)
                kept[site.name] = _unmask(mask, site.units)
                sites.append(site)
                if len(kept[site.name]) != count:
                    raise InputError(
                        f"plan: {str(path)!r} is corrupted: {site.name} says {count} units and marks {len(kept[site.name])}"
                    )
            return cls(kept, tuple(sites), about["fingerprint"], about["budget"])


def plan(
    scores: Scores,
    *,
    keep: float | None = None,
    flops: float | None = None,
    params: float | None = None,
    memory: float | None = None,
    speedup: float | None = None,
    latency: float | None = None,
    table: LatencyTable | None = None,
    allocation: Allocation = "uniform",
    floor: float = 0.0,
    align: int = 1,
    per_head: bool = False,
) -> Plan:
    """The units with the highest scores of each site, as many as the budget allows; ties go to the lower index.

    Exactly one budget. keep: the share of units that stays at every site (a fraction of a unit counts as one). flops, params:
    the share of the multiply-adds, or weights, of the model's layers that may remain (FLOPs at the mean length of the scored
    examples). memory: the share of all the model's weights, embeddings included. speedup, latency: how much faster than the
    dense model, or how many milliseconds a pass, as `table` predicts (`meet_latency` measures, and corrects). All but keep
    are met to within one step of one site.
    allocation: how a budget other than keep is spread over the sites. "uniform": one share for all, as Yang et al. 2023 have
    it; "global": the units with the highest scores of all sites; "knapsack": those that keep the most attribution for what
    they cost, with `budget["gap"]` saying how far the attribution may be from the optimum, as a share of it. floor: the share
    of its units that every site keeps at least; without one, global and knapsack may empty a site, and uniform leaves one.
    align: FFN widths are multiples of it, and with per_head the channels of a head of it or of 8, if that is less; rounded up
    under a keep budget, and down otherwise. per_head: channels are ranked within each head, the same number for each, so that
    heads stay alike. Raises InputError: no budget or several, one out of range, one that cannot be met; the message says what
    can; a table of another model or other units.
    """
    budgets = {"keep": keep, "flops": flops, "params": params, "memory": memory, "speedup": speedup, "latency": latency}
    name, value = the_budget(**budgets)
    check_spread(name, allocation, floor, align)
    price = _price(scores, name, table)
    found = ladders(scores, price, align, per_head, floor, may_empty=allocation != "uniform" and floor == 0)
    if name == "keep":
        rungs, gap = [ladder.at(value) for ladder in found], 0.0
    elif name in _MEASURED and table is not None:
        rungs, gap = _measured(found, name, value, allocation, table)
    else:
        rungs, gap = _within(found, name, value, allocation)
    counts = {ladder.site.name: ladder.counts[rung] for ladder, rung in zip(found, rungs, strict=True)}
    kept = {site.name: _highest(scores[site.name], counts[site.name], site, per_head) for site in scores.sites}
    remaining = {k: cost.remaining(scores.all_sites, scores.sites, counts, k, scores.tokens) for k in ("flops", "params")}
    how = {"allocation": allocation, "floor": floor, "gap": gap, "align": align}
    return Plan(kept, scores.sites, scores.fingerprint, {name: value, **how, "remaining": remaining})


def _price(scores: Scores, budget: str, table: LatencyTable | None) -> Price:
    """What a site costs by the numbers of units that it keeps, as a share of the whole that the budget is a share of."""
    if budget in _MEASURED:
        if table is None:
            raise InputError(f"table: expected a LatencyTable with the budget {budget}, got none")
        if table.fingerprint != scores.fingerprint or not {site.name for site in scores.sites} <= table.sites.keys():
            raise InputError(f"table: expected one of the scored model and sites ({scores.fingerprint}), got another")
        measured, total = table, table.total
        return lambda site, counts: [measured.of(site.name, count) / total for count in counts]
    kind = "flops" if budget in ("keep", "flops") else "params"
    whole = sum(cost.unit_cost(site, kind, scores.tokens) * site.units for site in scores.all_sites)
    whole = scores.weights if budget == "memory" else whole

    def share(site: Site, counts: Sequence[int]) -> list[float]:
        each = cost.unit_cost(site, kind, scores.tokens)
        return [each * count / whole for count in counts]

    return share


def _within(found: Sequence[Ladder], name: str, value: float, allocation: Allocation) -> tuple[list[int], float]:
    """Rungs whose cost, with all that is not on the ladders, is at most `value`; and the gap to the best, where it is known."""
    rest = 1 - sum(ladder.prices[-1] for ladder in found)
    smallest = rest + sum(ladder.prices[0] for ladder in found)
    if smallest > value + _ROUNDING:
        raise InputError(
            f"{name}: expected at least {smallest:.4f}, what is left with the least at each chosen site, got {value}"
        )
    return spread(found, value - rest + _ROUNDING, allocation)


def _measured(
    found: Sequence[Ladder], name: str, value: float, allocation: Allocation, table: LatencyTable
) -> tuple[list[int], float]:
    """The same in predicted milliseconds, which are not quite the sum of the sites': by bisection over that sum."""
    wanted = table.total / value if name == "speedup" else value

    def at(limit: float) -> tuple[list[int], float, float]:
        rungs, gap = spread(found, limit, allocation)
        counts = {ladder.site.name: ladder.counts[rung] for ladder, rung in zip(found, rungs, strict=True)}
        return rungs, gap, table.milliseconds(counts)

    low, high = (sum(pick(ladder.prices) for ladder in found) + _ROUNDING for pick in (min, max))
    rungs, gap, smallest = at(low)
    if smallest > wanted * (1 + _ROUNDING):
        reachable = f"at most {table.total / smallest:.2f}" if name == "speedup" else f"at least {smallest:.2f}"
        raise InputError(f"{name}: expected {reachable}, predicted of the least at each chosen site, got {value}")
    for _ in range(30):
        middle = (low + high) / 2
        tried, tried_gap, predicted = at(middle)
        if predicted <= wanted * (1 + _ROUNDING):
            low, rungs, gap = middle, tried, tried_gap
        else:
            high = middle
    return rungs, gap


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
