"""Plans: which units a model keeps under a budget. Pure functions of scores."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from secateur.attribution.scores import Scores
from secateur.model import cost
from secateur.model.sites import Site, require_distinct, sites_from_json
from secateur.planning.allocation import Allocation, Ladder, Price, allocate, ladders, ranks
from secateur.planning.budget import Budget, BudgetKind
from secateur.support.errors import FieldError, InputError, reading
from secateur.support.fields import checked_fields, read_object, require_type, shown
from secateur.support.files import write_atomically

if TYPE_CHECKING:
    from secateur.planning.latency_table import LatencyTable

FORMAT = "secateur-plan/1"
_ROUNDING = 1e-12  # The rounding error of a sum of shares.
_REMAINING = ("flops", "params")  # The shares that a plan tells.


@dataclass(frozen=True)
class Spread:
    """How a plan spreads its budget over the sites, and what remains of the model.

    Attributes:
        remaining: The shares of the layers' "params" and "flops" that remain.
        allocation: "uniform", "global" or "knapsack".
        floor: The share of its units that every site keeps at least.
        gap: How far the kept attribution may be from the best possible one, as a share of that one; 0 where it is not known.
        align: FFN widths are multiples of it.
    """

    remaining: dict[str, float]
    allocation: str = "uniform"
    floor: float = 0.0
    gap: float = 0.0
    align: int = 1


@dataclass(frozen=True)
class Plan(Mapping[str, Tensor]):
    """The units that each site keeps: `plan[site name]` is a sorted int64 tensor [kept units], which may be empty.

    Attributes:
        kept: The kept units by site name.
        sites: The planned sites.
        fingerprint: The fingerprint of the model that the plan is for.
        budget: The budget that the plan was made for, None for a plan that was made by hand.
        spread: How the budget was spread and what remains, None for a plan that was made by hand.

    Raises:
        InputError: A site is there twice, has no kept units, or its kept units are not rising numbers of its units.
    """

    kept: dict[str, Tensor]
    sites: tuple[Site, ...]
    fingerprint: str
    budget: Budget | None = None
    spread: Spread | None = None

    def __post_init__(self) -> None:
        require_distinct("plan", self.sites)
        if self.kept.keys() != {site.name for site in self.sites}:
            raise InputError(f"plan: expected kept units of the sites {[s.name for s in self.sites]}, got {list(self.kept)}")
        for site in self.sites:
            _require_kept(site, self.kept[site.name])

    def __getitem__(self, site: str) -> Tensor:
        return self.kept[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def summary(self) -> dict[str, Any]:
        """The budget and its spread as one JSON object: the budget's amount under its kind, then the fields of `Spread`."""
        asked: dict[str, Any] = {} if self.budget is None else {self.budget.kind: self.budget.amount}
        return {**asked, **({} if self.spread is None else _spread_json(self.spread))}

    def dumps(self) -> str:
        """The plan as JSON of a few kB. The kept units of a site are a bit mask in base64, lowest unit first."""
        kept = {site.name: {"kept": len(self[site.name]), "mask": _mask(self[site.name], site.units)} for site in self.sites}
        sites = [{**site.to_json(), **kept[site.name]} for site in self.sites]
        about = {"format": FORMAT, "fingerprint": self.fingerprint, "budget": self.summary(), "sites": sites}
        return json.dumps(about, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `dumps` to a file. The file appears when complete; an existing one is replaced."""
        write_atomically(path, self.dumps())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a file that `save` wrote, also one of version 0.1, which says "stay" for "kept".

        Args:
            path: The file.

        Returns:
            The plan.

        Raises:
            InputError: There is no such file, or it is not a plan file, or it is damaged.
        """
        if not Path(path).is_file():
            raise InputError(f"plan: no such file: {str(path)!r}")
        with reading("plan", path, "is not a plan file"):
            about = read_object(path)
            if about["format"] != FORMAT:
                raise InputError(f"plan: expected the format {FORMAT!r} in {str(path)!r}, got {shown(about['format'])}")
            require_type("fingerprint", str, about["fingerprint"])
            marks = [(entry.pop("mask"), entry.pop("kept" if "kept" in entry else "stay")) for entry in about["sites"]]
            sites, kept = sites_from_json("sites", about["sites"]), {}
            for site, (mask, count) in zip(sites, marks, strict=True):
                kept[site.name] = _unmask(mask, site.units)
                if len(kept[site.name]) != count:
                    raise InputError(
                        f"plan: {str(path)!r} is corrupted: {site.name} says {shown(count)} units and marks "
                        f"{len(kept[site.name])}"
                    )
            return cls(kept, sites, about["fingerprint"], *_read_summary(about["budget"]))


def require_plan(plan: Any) -> None:
    """Check that an argument is a plan, not the path of one or the kept units alone.

    Args:
        plan: The argument.

    Raises:
        InputError: It is not a plan.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"plan: expected a secateur.Plan, got {shown(plan)}")


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
    """Choose the units with the highest scores of each site, as many as the budget allows. Ties go to the lower index.

    Exactly one budget is given. Every budget but `keep` is met to within one step of one site.

    Args:
        scores: Scores of the units, from `attribute`.
        keep: The share of units that stays at every site. A fraction of a unit counts as one unit.
        flops: The share of the multiply-adds of the model's layers that may remain, at the mean length of the scored examples.
        params: The share of the parameters of the model's layers that may remain.
        memory: The share of all the model's weights, embeddings included, that may remain.
        speedup: How much faster than the dense model the pruned model is, as `table` predicts it. `meet_latency` measures the
            pruned model, and corrects the plan.
        latency: Milliseconds of a forward pass, as `table` predicts them.
        table: The latency table that `speedup` and `latency` need.
        allocation: How a budget other than `keep` is spread over the sites. "uniform": one share for all sites, as Yang et al.
            2023 have it. "global": the units with the highest scores of all sites. "knapsack": the units that keep the most
            attribution for their cost; `plan.spread.gap` tells how far the attribution may be from the optimum, as a share of
            the optimum.
        floor: The share of its units that every site keeps at least. Without a floor, "global" and "knapsack" may empty a site,
            and "uniform" leaves one unit.
        align: FFN widths are multiples of it. With `per_head`, the channels of a head are multiples of it or of 8, whichever is
            less. Numbers of units are rounded up under `keep`, and down otherwise.
        per_head: Rank channels within each head and keep the same number in each, so that heads stay alike.

    Returns:
        The plan.

    Raises:
        InputError: There is no budget, or several; a budget is out of range, or cannot be met (the message says what can); a
            score is NaN or inf; the table is missing, or is of another model or of other units.

    Example:
        `secateur.plan(scores, flops=0.5, allocation="knapsack", floor=0.1)`

    Reference:
        Yang et al. 2023, arXiv 2205.04157.
    """
    budget = Budget.of(keep=keep, flops=flops, params=params, memory=memory, speedup=speedup, latency=latency)
    return plan_within(scores, budget, table=table, allocation=allocation, floor=floor, align=align, per_head=per_head)


def plan_within(
    scores: Scores,
    budget: Budget,
    *,
    table: LatencyTable | None = None,
    allocation: Allocation = "uniform",
    floor: float = 0.0,
    align: int = 1,
    per_head: bool = False,
) -> Plan:
    """`plan` for a `Budget`. The arguments and errors are those of `plan`."""
    if not isinstance(scores, Scores):
        raise InputError(f"scores: expected the Scores that attribute returns, got {shown(scores)}")
    budget.check_spread(allocation, floor, align)
    if per_head and not any(site.is_channel for site in scores.sites):
        raise InputError("per_head: expected scores of the channels of heads (unit 'channel'), got scores of other units")
    _require_numbers(scores)
    price = _price(scores, budget, table)
    of_sites = ladders(scores, price, align, per_head, floor, may_empty=allocation != "uniform" and floor == 0)
    if budget.kind == "keep":
        rungs, gap = [ladder.at(budget.amount) for ladder in of_sites], 0.0
    elif budget.measured and table is not None:
        rungs, gap = _within_time(of_sites, budget, allocation, table)
    else:
        rungs, gap = _within_share(of_sites, budget, allocation)
    counts = {ladder.site.name: ladder.counts[rung] for ladder, rung in zip(of_sites, rungs, strict=True)}
    kept = {site.name: _highest(scores[site.name], counts[site.name], site, per_head) for site in scores.sites}
    remaining = {kind: cost.remaining(scores.all_sites, scores.sites, counts, kind, scores.tokens) for kind in _REMAINING}
    return Plan(kept, scores.sites, scores.fingerprint, budget, Spread(remaining, allocation, floor, gap, align))


def _require_numbers(scores: Scores) -> None:
    """Raise InputError for scores that are NaN or inf: they have no order, or no sum."""
    for site in scores.sites:
        if not torch.isfinite(scores[site.name]).all():
            raise InputError(f"scores: expected finite numbers, got NaN or inf at site {site.name!r}")


def _price(scores: Scores, budget: Budget, table: LatencyTable | None) -> Price:
    """The cost of a site by the number of units that it keeps, as a share of the whole that the budget limits."""
    if budget.measured:
        if table is None:
            raise InputError(f"table: expected a LatencyTable with the budget {budget.kind}, got none")
        if table.fingerprint != scores.fingerprint or not {site.name for site in scores.sites} <= table.sites.keys():
            raise InputError(f"table: expected one of the scored model and sites ({scores.fingerprint}), got another")
        measured, total = table, table.total
        return lambda site, counts: [measured.of(site.name, count) / total for count in counts]
    kind = "flops" if budget.kind in ("keep", "flops") else "params"
    of_layers = sum(cost.unit_cost(site, kind, scores.tokens) * site.units for site in scores.all_sites)
    whole = scores.weights if budget.kind == "memory" else of_layers

    def share(site: Site, counts: Sequence[int]) -> list[float]:
        of_unit = cost.unit_cost(site, kind, scores.tokens)
        return [of_unit * count / whole for count in counts]

    return share


def _within_share(of_sites: Sequence[Ladder], budget: Budget, allocation: Allocation) -> tuple[list[int], float]:
    """The rungs [sites] whose cost, with everything that is not on the ladders, is at most the budget, and the gap."""
    rest = 1 - sum(ladder.prices[-1] for ladder in of_sites)
    smallest = rest + sum(ladder.prices[0] for ladder in of_sites)
    if smallest > budget.amount + _ROUNDING:
        raise InputError(
            f"{budget.kind}: expected at least {smallest:.4f}, what is left with the least at each chosen site, "
            f"got {budget.amount}"
        )
    return allocate(of_sites, budget.amount - rest + _ROUNDING, allocation)


def _within_time(
    of_sites: Sequence[Ladder], budget: Budget, allocation: Allocation, table: LatencyTable
) -> tuple[list[int], float]:
    """The rungs [sites] whose predicted milliseconds are at most the budget, and the gap. The milliseconds are not quite the
    sum of the sites' milliseconds, so the limit on that sum is found by bisection."""
    wanted = budget.milliseconds(table.total)

    def at(limit: float) -> tuple[list[int], float, float]:
        rungs, gap = allocate(of_sites, limit, allocation)
        counts = {ladder.site.name: ladder.counts[rung] for ladder, rung in zip(of_sites, rungs, strict=True)}
        return rungs, gap, table.milliseconds(counts)

    low, high = (sum(pick(ladder.prices) for ladder in of_sites) + _ROUNDING for pick in (min, max))
    rungs, gap, smallest = at(low)
    if smallest > wanted * (1 + _ROUNDING):
        speedup = budget.kind == "speedup"
        reachable = f"at most {table.total / smallest:.2f}" if speedup else f"at least {smallest:.2f}"
        raise InputError(
            f"{budget.kind}: expected {reachable}, predicted of the least at each chosen site, got {budget.amount}"
        )
    limit = high  # Bisection alone would come near to the highest limit and never try it.
    for _ in range(31):
        limit_rungs, limit_gap, predicted = at(limit)
        if predicted <= wanted * (1 + _ROUNDING):
            low, rungs, gap = limit, limit_rungs, limit_gap
        else:
            high = limit
        limit = (low + high) / 2
    return rungs, gap


def _highest(scores: Tensor, count: int, site: Site, per_head: bool) -> Tensor:
    """The `count` units with the highest scores [units], sorted; the same number from each head where heads are ranked."""
    order = ranks(scores, site, per_head)  # [heads, units of a head]
    first = torch.arange(len(order)).unsqueeze(1) * (site.units // len(order))  # [heads, 1]: the first unit of each head
    return (order[:, : count // len(order)] + first).flatten().sort().values  # [count]


def _spread_json(spread: Spread) -> dict[str, Any]:
    """The fields in the order of the plan file: what remains comes last."""
    fields = asdict(spread)
    return {**{name: fields[name] for name in ("allocation", "floor", "gap", "align")}, "remaining": fields["remaining"]}


def _read_summary(content: Any) -> tuple[Budget | None, Spread | None]:
    """The budget and its spread from `Plan.summary`. Raises FieldError for other fields and for values out of range."""
    require_type("budget", dict[str, Any], content)
    amounts = {name: content[name] for name in get_args(BudgetKind) if name in content}
    of_spread = {name: value for name, value in content.items() if name not in amounts}
    spread = Spread(**checked_fields("budget", of_spread, Spread)) if of_spread else None
    if spread is not None and spread.remaining.keys() != set(_REMAINING):
        raise FieldError(f"budget.remaining: expected {' and '.join(_REMAINING)}, got {shown(spread.remaining)}")
    try:
        return Budget.of(**amounts) if amounts else None, spread
    except InputError as error:
        raise FieldError(str(error)) from error


def _mask(kept: Tensor, units: int) -> str:
    """The kept units as a bit mask in base64, eight units a byte, lowest unit first."""
    bits = torch.zeros(-(-units // 8) * 8, dtype=torch.int64)  # [8 * bytes]
    bits[kept] = 1
    packed = (bits.view(-1, 8) << torch.arange(8)).sum(1)  # [bytes]
    return base64.b64encode(bytes(packed.tolist())).decode()


def _unmask(text: Any, units: int) -> Tensor:
    """The kept units [kept units] of a bit mask in base64. Raises FieldError where the mask is not one of `units` units."""
    packed = torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.int64)  # [bytes]
    bits = (packed.unsqueeze(1) >> torch.arange(8)) & 1  # [bytes, 8]
    kept = bits.flatten().nonzero().flatten()  # [kept units]
    last = int(kept[-1]) if len(kept) else -1
    if len(packed) != -(-units // 8) or last >= units:
        raise FieldError(f"expected a mask of {units} units, got {len(packed)} bytes whose last mark is {last}")
    return kept


def _require_kept(site: Site, kept: Any) -> None:
    """Raise InputError unless the kept units of a site are rising numbers of its units, int64 [kept units]."""
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.dim() != 1:
        raise InputError(f"plan: expected an int64 tensor [kept units] for {site.name!r}, got {shown(kept)}")
    wrong = len(kept) and (int(kept[0]) < 0 or int(kept[-1]) >= site.units or bool((kept.diff() <= 0).any()))
    if wrong:
        raise InputError(
            f"plan: expected rising numbers from 0 to {site.units - 1} for {site.name!r}, got {shown(kept.tolist())}"
        )
