"""Plans: which units a model keeps under a budget. Pure functions of scores."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from secateur.attribution.criteria import name_of
from secateur.attribution.scores import Scores, as_scores
from secateur.model import cost
from secateur.model.sites import Site, by_group, counted, require_distinct, sites_from_json
from secateur.planning.allocation import Allocation, Ladder, Price, allocate, ladders, ranks
from secateur.planning.budget import Budget, BudgetKind
from secateur.planning.latency_table import LatencyTable, as_table
from secateur.planning.shapes import ALIKE, Cost, Shape, alike, require_shape, shared, whole_or_absent
from secateur.support.errors import FieldError, InputError, reading
from secateur.support.fields import checked_fields, read_object, require_type, shown
from secateur.support.files import object_or_file, write_atomically
from secateur.support.html import html_table
from secateur.support.tensors import same_tensors

FORMAT = "secateur-plan/1"
_ROUNDING = 1e-12  # The rounding error of a sum of shares.
_REMAINING = ("flops", "params")  # The shares that a plan tells.


class UnreachableError(InputError):
    """No model of the shape is within the budget."""


@dataclass(frozen=True)
class Spread:
    """How a plan spreads its budget over the sites, and what remains of the model.

    Attributes:
        remaining: The shares of the layers' "params" and "flops" that remain.
        allocation: "uniform", "global" or "knapsack".
        floor: The share of its units that every site keeps at least.
        gap: How far the kept attribution may be from the best possible one, as a share of that one; 0 where it is not known.
        align: FFN widths are multiples of it.
        shape: "any", "per-layer", "uniform" or "stock", as in `plan`.
        criterion: The short name of the criterion of the scores; "" in a file of an older version.
    """

    remaining: dict[str, float]
    allocation: str = "uniform"
    floor: float = 0.0
    gap: float = 0.0
    align: int = 1
    shape: Shape = "any"
    criterion: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Mapping[str, Tensor]):
    """The units that each site keeps: `plan[site name]` is a sorted int64 tensor [kept units], which may be empty.

    Attributes:
        kept: The kept units by site name.
        sites: The planned sites.
        fingerprint: The fingerprint of the model that the plan is for.
        budget: The budget that the plan was made for, None for a plan that was made by hand.
        spread: How the budget was spread and what remains, None for a plan that was made by hand.
        removed_blocks: The names of blocks, such as "encoder.3", that are removed as wholes: biases and norms go too, and the
            next block reads what the removed one would have read. Their sites keep no unit.

    Raises:
        InputError: A site is there twice, has no kept units, or its kept units are not rising numbers of its units; or a
            removed block has no site, or one that keeps units.
    """

    kept: dict[str, Tensor]
    sites: tuple[Site, ...]
    fingerprint: str
    budget: Budget | None = None
    spread: Spread | None = None
    removed_blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_distinct("plan", self.sites)
        if self.kept.keys() != {site.name for site in self.sites}:
            raise InputError(f"plan: expected kept units of the sites {[s.name for s in self.sites]}, got {list(self.kept)}")
        for site in self.sites:
            _require_kept(site, self.kept[site.name])
        _require_removed(self)

    def __getitem__(self, site: str) -> Tensor:
        return self.kept[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        same = (self.fingerprint, self.sites, self.budget, self.spread) == (
            other.fingerprint, other.sites, other.budget, other.spread,
        )  # fmt: skip
        same = same and set(self.removed_blocks) == set(other.removed_blocks)
        return same and same_tensors(self.kept, other.kept)

    def __hash__(self) -> int:
        counts = tuple(len(self.kept[site.name]) for site in self.sites)
        return hash((self.fingerprint, self.sites, counts, self.budget, frozenset(self.removed_blocks)))

    def __repr__(self) -> str:
        budget = [] if self.budget is None else [str(self.budget)]
        groups = [f"{group}: {kept}" for group, kept, *_ in self._groups()]
        removed = [f"{counted(len(self.removed_blocks), 'block')} removed"] if self.removed_blocks else []
        return f"Plan({'; '.join([*budget, *groups, *removed])})"

    def _repr_html_(self) -> str:
        columns = ("sites", "kept", "share", "number", "parameters saved")
        return html_table("Plan" if self.budget is None else f"Plan: {self.budget}", columns, list(self._groups()))

    def summary(self) -> str:
        """Describe the plan in a few lines: the budget, the kept units of each kind of site, what remains and what is saved.

        Example:
            >>> print(plan.summary())
        """
        spread, lines = self.spread, [f"plan of {counted(len(self), 'site')}"]
        if self.budget is not None:
            lines.append(f"budget: {self.budget}")
        if spread is not None:
            widths = f", FFN widths in multiples of {spread.align}" if spread.align > 1 else ""
            shape = "" if spread.shape == "any" else f", shape {spread.shape}"
            lines.append(f"allocation: {spread.allocation}, floor {spread.floor:.2g}{widths}{shape}")
        groups = list(self._groups())
        width = max(len(group) for group, *_ in groups)
        lines += [f"  {group:{width}}  {kept} ({share}) in {counted(sites, 'site')}" for group, kept, share, sites, _ in groups]
        if self.removed_blocks:
            lines.append(f"removed blocks: {', '.join(self.removed_blocks)}")
        if spread is not None:
            flops, params = (f"{spread.remaining[kind]:.1%}" for kind in _REMAINING)
            lines.append(f"remaining: {flops} of the layers' FLOPs, {params} of the layers' parameters")
        whole = sum(site.units * site.parameters for site in self.sites)
        lines.append(f"saved: {_saved(self, self.sites):,.0f} of the {whole:,.0f} parameters of these sites")
        return "\n".join(lines)

    def _groups(self) -> Iterator[tuple[str, str, str, int, str]]:
        """Yield for each kind of site its name, the kept units, their share, the number of sites, and the saved parameters."""
        for group, sites in by_group(self.sites).items():
            kept, units = sum(len(self[site.name]) for site in sites), sum(site.units for site in sites)
            saved = f"{_saved(self, sites):,.0f}"
            yield group, f"{kept:,} of {counted(units, sites[0].unit)}", f"{kept / units:.0%}", len(sites), saved

    def budget_json(self) -> dict[str, Any]:
        """The budget and its spread as one JSON object: the budget's amount under its kind, then the fields of `Spread`."""
        asked: dict[str, Any] = {} if self.budget is None else {self.budget.kind: self.budget.amount}
        return {**asked, **({} if self.spread is None else _spread_json(self.spread))}

    def removed_json(self) -> dict[str, Any]:
        """The removed blocks as a JSON object, empty where there are none."""
        return {"removed_blocks": list(self.removed_blocks)} if self.removed_blocks else {}

    def dumps(self) -> str:
        """The plan as JSON of a few kB. The kept units of a site are a bit mask in base64, lowest unit first."""
        kept = {site.name: {"kept": len(self[site.name]), "mask": _mask(self[site.name], site.units)} for site in self.sites}
        sites = [{**site.to_json(), **kept[site.name]} for site in self.sites]
        about = {"format": FORMAT, "fingerprint": self.fingerprint, "budget": self.budget_json(), "sites": sites}
        return json.dumps({**about, **self.removed_json()}, indent=1) + "\n"

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
            removed = about.get("removed_blocks", [])
            require_type("removed_blocks", list[str], removed)
            return cls(kept, sites, about["fingerprint"], *_read_budget(about["budget"]), tuple(removed))


def as_plan(plan: Any) -> Plan:
    """Return the plan that an argument gives: a plan, or the path of its file.

    Args:
        plan: The argument.

    Raises:
        InputError: It is neither, or the file is not a plan file.
    """
    return object_or_file("plan", plan, Plan, Plan.load, "secateur.plan(scores, keep=0.6) makes one from scores")


def _saved(plan: Plan, sites: Sequence[Site]) -> float:
    """The parameters of the units that a plan removes from some of its sites."""
    return sum((site.units - len(plan[site.name])) * site.parameters for site in sites)


def plan(
    scores: Scores | str | Path,
    *,
    keep: float | None = None,
    flops: float | None = None,
    params: float | None = None,
    memory: float | None = None,
    speedup: float | None = None,
    latency: float | None = None,
    table: LatencyTable | str | Path | None = None,
    allocation: Allocation = "uniform",
    floor: float = 0.0,
    align: int = 1,
    per_head: bool = False,
    shape: Shape = "any",
) -> Plan:
    """Choose the units with the highest scores of each site, as many as the budget allows. Ties go to the lower index.

    Exactly one budget is given. Every budget but `keep` is met to within one step of one site.

    Args:
        scores: Scores of the units, from `attribute`, or the path of their file.
        keep: The share of units that stays at every site. A fraction of a unit counts as one unit.
        flops: The share of the multiply-adds of the model's layers that may remain, at the mean length of the scored examples.
        params: The share of the parameters of the model's layers that may remain.
        memory: The share of all the model's weights, embeddings included, that may remain.
        speedup: How much faster than the dense model the pruned model is, as `table` predicts it. `meet_latency` measures the
            pruned model, and corrects the plan.
        latency: Milliseconds of a forward pass, as `table` predicts them.
        table: The latency table that `speedup` and `latency` need, or the path of its file.
        allocation: How a budget other than `keep` is spread over the sites. "uniform": one share for all sites, as Yang et al.
            2023 have it. "global": the units with the highest scores of all sites. "knapsack": the units that keep the most
            attribution for their cost; `plan.spread.gap` tells how far the attribution may be from the optimum, as a share of
            the optimum.
        floor: The share of its units that every site keeps at least. Without a floor, "global" and "knapsack" may empty a site,
            and "uniform" leaves one unit.
        align: FFN widths are multiples of it. With `per_head`, the channels of a head are multiples of it or of 8, whichever is
            less. Numbers of units are rounded up under `keep`, and down otherwise.
        per_head: Rank channels within each head and keep the same number in each, so that heads stay alike.
        shape: What an engine can load. "any": other widths in each layer. "per-layer": another FFN width in each layer, and
            attention whole or absent. "uniform" and "stock": one FFN width and one number of heads. Where layers share a table
            of positions (T5), they keep the same heads. Under "stock", all heads stay where the config of the model's own class
            cannot say fewer (BERT), and `compress` may remove whole blocks.

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
    return plan_within(
        scores, budget, table=table, allocation=allocation, floor=floor, align=align, per_head=per_head, shape=shape
    )


def plan_within(
    scores: Scores | str | Path,
    budget: Budget,
    *,
    table: LatencyTable | str | Path | None = None,
    allocation: Allocation = "uniform",
    floor: float = 0.0,
    align: int = 1,
    per_head: bool = False,
    shape: Shape = "any",
) -> Plan:
    """`plan` for a `Budget`. The arguments and errors are those of `plan`."""
    if shape in ALIKE:
        options: dict[str, Any] = {"table": table, "allocation": allocation, "floor": floor, "align": align}
        return plans_alike(scores, budget, per_head=per_head, shape=shape, **options)[0]
    scores, table = as_scores(scores), None if table is None else as_table(table)
    budget.check_spread(allocation, floor, align)
    require_shape(shape, scores.sites, allocation, per_head=per_head)
    if per_head and not any(site.is_channel for site in scores.sites):
        raise InputError("per_head: expected scores of the channels of heads (unit 'channel'), got scores of other units")
    _require_numbers(scores)
    price = _price(scores, budget, table)
    of_sites = ladders(scores, price, align, per_head, floor, may_empty=allocation != "uniform" and floor == 0)
    if shape == "per-layer":
        of_sites = whole_or_absent(of_sites)
    if budget.kind == "keep":
        rungs, gap = [ladder.at(budget.amount) for ladder in of_sites], 0.0
    elif budget.measured and table is not None:
        rungs, gap = _within_time(of_sites, budget, allocation, table)
    else:
        rungs, gap = _within_share(of_sites, budget, allocation)
    counts = {ladder.site.name: ladder.counts[rung] for ladder, rung in zip(of_sites, rungs, strict=True)}
    return _plan_of(scores, counts, budget, per_head, Spread({}, allocation, floor, gap, align, shape))


def plans_alike(
    scores: Scores | str | Path,
    budget: Budget,
    *,
    removed_blocks: Collection[str] = (),
    table: LatencyTable | str | Path | None = None,
    allocation: Allocation = "uniform",
    floor: float = 0.0,
    align: int = 1,
    per_head: bool = False,
    shape: Shape = "stock",
) -> list[Plan]:
    """Return the plans within a budget whose layers are alike: for each number of heads the one with the widest FFN.

    Args:
        scores: As in `plan`, as are all arguments but `budget` and `removed_blocks`.
        budget: The budget.
        removed_blocks: The names of blocks that are removed, whose sites are all scored.
        table: See `scores`, as for the next ones.
        allocation: See `scores`.
        floor: See `scores`.
        align: See `scores`.
        per_head: See `scores`.
        shape: "uniform" or "stock".

    Returns:
        The plans. The one that keeps the most attribution comes first.

    Raises:
        UnreachableError: No such plan is within the budget.
        InputError: As in `plan`.
    """
    scores, table = as_scores(scores), None if table is None else as_table(table)
    budget.check_spread(allocation, floor, align)
    require_shape(shape, scores.sites, allocation, per_head=per_head)
    _require_numbers(scores)
    scores, gone = shared(scores), {site.name for site in scores.sites if site.block in removed_blocks}
    removed = tuple(dict.fromkeys(site.block for site in scores.sites if site.name in gone))
    of_sites = ladders(scores, _price(scores, budget, table), align, False, floor)
    if budget.kind == "keep":
        models = [_at_share(of_sites, gone, budget.amount, shape)]
    else:
        around = scores.parameters_around(removed) / scores.weights if budget.kind == "memory" else 0.0
        spent, limit = _cost_of_counts(of_sites, budget, table, around)
        models = [counts for _, counts in alike(of_sites, gone, spent, limit, stock=shape == "stock")]
        if not models:
            least = spent({ladder.site.name: _least(ladder, gone, shape) for ladder in of_sites})
            raise UnreachableError(_unreachable(budget, least, table, shape, removed))
    spread = Spread({}, allocation, floor, 0.0, align, shape)
    return [replace(_plan_of(scores, counts, budget, False, spread), removed_blocks=removed) for counts in models]


def plans_by_depth(scores: Scores, budget: Budget, removable: Sequence[str], **options: Any) -> Iterator[list[Plan]]:
    """Yield the `plans_alike` without the first of some blocks: without none, one, two and so on, where such plans exist.

    Args:
        scores: The scores.
        budget: The budget.
        removable: The names of blocks in the order in which they can be removed. Those with sites that have no scores stay.
        options: Further arguments of `plans_alike`.

    Raises:
        UnreachableError: No depth is within the budget.
        InputError: As in `plan`.
    """
    scored = scores.scored_blocks()
    # Under `keep` every site keeps its share.
    whole = [block for block in removable if block in scored and budget.kind != "keep"]
    found = False
    for depth in range(len(whole) + 1):
        try:
            plans = plans_alike(scores, budget, removed_blocks=whole[:depth], **options)
        except UnreachableError:
            if depth == len(whole) and not found:
                raise
            continue
        found = True
        yield plans


def _unreachable(budget: Budget, least: float, table: LatencyTable | None, shape: Shape, removed: Sequence[str]) -> str:
    """The message for a budget below the cost of the smallest model of a shape."""
    expected = f"at least {least:.4f}"
    if table is not None and budget.kind == "speedup":
        expected = f"at most {table.total / least:.2f}"
    depth = f"without {counted(len(removed), 'block')}" if removed else "with all blocks"
    return f"{budget.kind}: expected {expected}, the smallest {shape} model {depth}, got {budget.amount}"


def _least(ladder: Ladder, gone: Collection[str], shape: Shape) -> int:
    """The fewest units that a site keeps where layers are alike."""
    if ladder.site.name in gone:
        return 0
    return ladder.counts[-1 if shape == "stock" and ladder.site.in_stock == "whole" else 0]


def _at_share(of_sites: Sequence[Ladder], gone: Collection[str], share: float, shape: Shape) -> dict[str, int]:
    """The number of units of each site where each keeps a share. Raises InputError where a site has to stay whole."""
    whole = next((ladder.site.name for ladder in of_sites if ladder.site.in_stock == "whole"), None)
    if shape == "stock" and whole is not None and share < 1:
        raise InputError(f"keep: expected another budget, as all heads of {whole} stay in this shape, got {share}")
    return {ladder.site.name: 0 if ladder.site.name in gone else ladder.counts[ladder.at(share)] for ladder in of_sites}


def _cost_of_counts(
    of_sites: Sequence[Ladder], budget: Budget, table: LatencyTable | None, removed: float
) -> tuple[Cost, float]:
    """The cost of a model by the numbers of units that its sites keep, and the highest cost within a budget.

    `removed` is the cost that a removed block has beyond its units.
    """
    if budget.measured and table is not None:
        return table.milliseconds, budget.milliseconds(table.total) * (1 + _ROUNDING)
    prices = {ladder.site.name: {0: 0.0, **dict(zip(ladder.counts, ladder.prices, strict=True))} for ladder in of_sites}
    rest = 1 - removed - sum(ladder.prices[-1] for ladder in of_sites)
    return lambda counts: rest + sum(prices[name][count] for name, count in counts.items()), budget.amount + _ROUNDING


def _plan_of(scores: Scores, counts: Mapping[str, int], budget: Budget, per_head: bool, spread: Spread) -> Plan:
    """The plan in which each site keeps so many of its best units. What remains is added to the spread."""
    kept = {site.name: _highest(scores[site.name], counts[site.name], site, per_head) for site in scores.sites}
    remaining = {kind: cost.remaining(scores.all_sites, scores.sites, counts, kind, scores.tokens) for kind in _REMAINING}
    spread = replace(spread, remaining=remaining, criterion=name_of(scores.criterion))
    return Plan(kept, scores.sites, scores.fingerprint, budget, spread)


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
    return {
        **{name: fields[name] for name in ("allocation", "floor", "gap", "align", "shape", "criterion")},
        "remaining": fields["remaining"],
    }


def _read_budget(content: Any) -> tuple[Budget | None, Spread | None]:
    """The budget and its spread from `Plan.budget_json`. Raises FieldError for other fields and for values out of range."""
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


def _require_removed(plan: Plan) -> None:
    """Raise FieldError unless the removed blocks are blocks of the plan's sites, each once, whose sites keep no unit."""
    removed, known = plan.removed_blocks, dict.fromkeys(site.block for site in plan.sites)
    if not isinstance(removed, tuple) or not all(isinstance(name, str) for name in removed):
        raise FieldError(f"removed_blocks: expected a tuple of names of blocks, got {shown(removed)}")
    for number, name in enumerate(removed):
        if name not in known:
            raise FieldError(f"removed_blocks: expected some of {', '.join(known)}, got {name!r}")
        if name in removed[:number]:
            raise FieldError(f"removed_blocks: expected each block once, got {name!r} twice")
    for site in plan.sites:
        if site.block in removed and len(plan[site.name]):
            units = counted(len(plan[site.name]), site.unit)
            raise FieldError(f"removed_blocks: expected blocks whose sites keep no unit, got one with {units} at {site.name}")


def _require_kept(site: Site, kept: Any) -> None:
    """Raise InputError unless the kept units of a site are rising numbers of its units, int64 [kept units]."""
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.dim() != 1:
        raise InputError(f"plan: expected an int64 tensor [kept units] for {site.name!r}, got {shown(kept)}")
    wrong = len(kept) and (int(kept[0]) < 0 or int(kept[-1]) >= site.units or bool((kept.diff() <= 0).any()))
    if wrong:
        raise InputError(
            f"plan: expected rising numbers from 0 to {site.units - 1} for {site.name!r}, got {shown(kept.tolist())}"
        )
