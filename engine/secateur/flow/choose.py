"""choose: try several plans and recoveries, and find the one that changes the model's predictions least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.attribution.scores import Scores, as_scores
from secateur.data.examples import Examples
from secateur.measuring.divergence import divergence, held_logits
from secateur.model.sites import counted as counted_of
from secateur.planning.allocation import ONE_UNIT, Allocation
from secateur.planning.budget import Budget
from secateur.planning.plan import Plan, as_plan, plan_within, plans_by_depth
from secateur.planning.shapes import ALIKE
from secateur.pruning.prune import prune
from secateur.recovery import Method
from secateur.recovery.recover import refit_, require_methods
from secateur.recovery.targets import HELD, targets_of
from secateur.support.errors import InputError
from secateur.support.fields import shown
from secateur.support.progress import Progress, counted
from secateur.tasks import Task
from secateur.tasks.base import require_fit
from secateur.tasks.batches import model_device

RECOVERIES: tuple[Method | None, ...] = ("least_squares", "scale", None)
_DEPTHS = 5  # Numbers of blocks that are tried at most.
_COMPARED = 5  # Every fifth example serves for the comparison.
# Of so many examples at most, four fifths fit each candidate: telling candidates apart needs fewer than fitting the chosen one.
_AT_MOST = 120
_ALSO_COMPARED = 80  # Further examples at most that candidates are compared on. They cost one forward pass a candidate.


@dataclass(frozen=True)
class Candidate:
    """A plan with a recovery.

    Attributes:
        plan: The plan.
        recovery: The method of `recover_`, None for no recovery.
        divergence: The mean over examples of the Kullback-Leibler divergence of the pruned model's predictions from the dense
            model's, in nats, summed over the target positions (or labels, where any number of them is right). For a model with
            one output, half the squared difference of the values. None where nothing was compared.
    """

    plan: Plan
    recovery: Method | None
    divergence: float | None

    def to_json(self) -> dict[str, Any]:
        """The plan's summary, the recovery and the divergence."""
        plan = {**self.plan.budget_json(), **self.plan.removed_json()}
        return {"plan": plan, "recovery": self.recovery, "divergence": self.divergence}

    def __str__(self) -> str:
        allocation, floor, criterion = (self.plan.budget_json().get(name) for name in ("allocation", "floor", "criterion"))
        floored = f" with floor {floor:.2g}" if floor and floor > ONE_UNIT else " with a unit a site" if floor else ""
        blocks = counted_of(len(self.plan.removed_blocks), "block")
        removed = f", {blocks} removed" if self.plan.removed_blocks else ""
        distance = "" if self.divergence is None else f": {self.divergence:.4f} nats from the dense model"
        scored = f"criterion {criterion}, " if criterion else ""
        return f"{scored}allocation {allocation}{floored}{removed}, recovery {self.recovery or 'none'}{distance}"


def alternatives(
    scores: Scores | str | Path,
    *,
    allocation: Allocation | None = None,
    floor: float | None = None,
    removable: Sequence[str] = (),
    **options: Any,
) -> list[Plan]:
    """Make the plans that are worth trying under one budget.

    They are the uniform plan, and knapsacks that leave every site at least 0.85 of its uniform share, one unit, or nothing.
    Where layers must be alike (`shape`), they are for a few numbers of removed blocks the plan that keeps the most attribution,
    and the one with the most heads.

    Args:
        scores: Scores of the units, or the path of their file.
        allocation: The allocation, if it is settled; there is then one plan. Under `keep` it is always uniform.
        floor: The floor, if it is settled.
        removable: With shape "stock", the names of blocks in the order in which they can be removed, from `removable_blocks`.
            Blocks with sites that have no scores stay.
        options: The budget and everything else that `plan` takes.

    Returns:
        The plans.

    Raises:
        InputError: As `plan` does.
    """
    budget = Budget.taken_from(options)
    return alternatives_within(as_scores(scores), budget, allocation=allocation, floor=floor, removable=removable, **options)


def alternatives_within(
    scores: Scores,
    budget: Budget,
    *,
    allocation: Allocation | None = None,
    floor: float | None = None,
    removable: Sequence[str] = (),
    **options: Any,
) -> list[Plan]:
    """Return the `alternatives` for a `Budget`.

    Args:
        scores: As in `alternatives`.
        budget: The budget.
        allocation: As in `alternatives`.
        floor: As in `alternatives`.
        removable: As in `alternatives`.
        options: Further arguments of `plan`.
    """
    _require_removable(scores, removable, options.get("shape", "any"))
    if options.get("shape") in ALIKE:
        return _alike(scores, budget, removable, allocation=allocation or "uniform", floor=floor or 0.0, **options)
    if allocation is not None or budget.kind == "keep":
        return [plan_within(scores, budget, allocation=allocation or "uniform", floor=floor or 0.0, **options)]
    uniform = plan_within(scores, budget, **options)
    share = min(len(uniform[site.name]) / site.units for site in scores.sites)
    floors = (0.85 * share, ONE_UNIT, 0.0) if floor is None else (floor,)
    return [uniform, *(plan_within(scores, budget, allocation="knapsack", floor=least, **options) for least in floors)]


def _require_removable(scores: Scores, removable: Sequence[str], shape: str) -> None:
    """Raise InputError for blocks that the model has not, and for any blocks under another shape than "stock"."""
    if isinstance(removable, str) or (removable and shape != "stock"):
        raise InputError(f"removable: expected names of blocks, with shape stock alone, got {shown(removable)} with {shape!r}")
    known = dict.fromkeys(site.block for site in scores.all_sites)
    for name in removable:
        if name not in known:
            raise InputError(f"removable: expected some of {', '.join(known)}, got {shown(name)}")


def _alike(scores: Scores, budget: Budget, removable: Sequence[str], **options: Any) -> list[Plan]:
    """The plans whose layers are alike: for a few depths, the one that keeps the most attribution, and that with most heads.

    A depth is left out where the model is within the budget without any other cut: a deeper one is as fast.
    """
    by_depth: list[list[Plan]] = []
    for plans in plans_by_depth(scores, budget, removable, **options):
        by_depth.append(plans)
        best = plans[0]
        if all(len(best[site.name]) == site.units for site in scores.sites if site.block not in best.removed_blocks):
            break
    step = max(1, -(-len(by_depth) // _DEPTHS))
    chosen = [plan for plans in by_depth[::step] for plan in (plans[0], max(plans, key=_heads))]
    return list(dict.fromkeys(chosen))


def _heads(plan: Plan) -> int:
    """The number of heads that a plan keeps."""
    return sum(len(plan[site.name]) for site in plan.sites if site.is_head)


def choose(
    model: nn.Module,
    task: Task,
    plans: Sequence[Plan | str | Path],
    examples: Examples,
    *,
    recoveries: Sequence[Method | None] = RECOVERIES,
    unlabeled: bool = False,
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Try every plan with the first recovery, then the best plan with the other recoveries.

    Models are pruned and recovered on four fifths of the first 120 examples. Their predictions for the other fifth, and for up
    to 80 further examples, are compared with the dense model's. Where there is only one candidate, nothing is tried.

    Args:
        model: The dense model. It is left untouched.
        task: The task.
        plans: The plans to try, or the paths of their files.
        examples: The examples, as in `recover_`.
        recoveries: Methods of `recover_`, None for no recovery.
        unlabeled: Whether examples are inputs alone, as in `recover_`.
        max_tokens: Padded input tokens in a batch, as in `recover_`.
        progress: True for a progress bar, or a function of (candidates tried, all candidates).

    Returns:
        The candidates. The one that changes the predictions least comes first; equal ones stay in the order given.

    Raises:
        InputError: There is no plan, no recovery, or there are fewer than two examples; or `prune` or `recover_` raise it.
    """
    if isinstance(plans, (str, Path, Plan)) or not isinstance(plans, Sequence):
        raise InputError(f"plans: expected a list of plans, got {shown(plans)}")
    given = [as_plan(plan) for plan in plans]
    if not given or not recoveries:
        raise InputError(f"plans: expected one at least, and one recovery, got {len(given)} and {len(recoveries)}")
    total = len(given) + len(recoveries) - 1
    if total == 1:
        return [Candidate(given[0], recoveries[0], None)]
    trials = Trials(model, task, examples, recoveries, unlabeled=unlabeled, max_tokens=max_tokens)
    return trials.best_of(given, recoveries, progress)


class Trials:
    """Tries of plans with recoveries on some examples. The dense model runs once for all of them.

    Args:
        model: The dense model. It is left untouched.
        task: The task.
        examples: The examples, as in `recover_`. 200 are used at most.
        recoveries: The methods that may be tried.
        unlabeled: As in `recover_`.
        max_tokens: As in `recover_`.

    Raises:
        InputError: The examples or methods do not fit, or there are fewer than two examples.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        examples: Examples,
        recoveries: Sequence[Method | None],
        *,
        unlabeled: bool,
        max_tokens: int,
    ) -> None:
        require_fit(task, model)
        require_methods(model, recoveries)
        rows = task.read(examples, all_labels=unlabeled)
        if len(rows) < 2:
            raise InputError(f"examples: expected two at least, to fit on one and to compare on the other, got {len(rows)}")
        every, first = min(_COMPARED, len(rows)), rows[:_AT_MOST]
        fitted = [row for k, row in enumerate(first) if k % every]
        compared = [*first[::every], *rows[_AT_MOST : _AT_MOST + _ALSO_COMPARED]]
        self._model, self._task = model, task
        self._targets = targets_of(model, task, fitted, unlabeled=unlabeled, max_tokens=max_tokens)
        items = task.items(model, compared, all_labels=unlabeled)
        self._batches = list(task.batches(items, model_device(model), max_tokens))
        self._logits = held_logits(model, task, self._batches, HELD)

    def best_of(
        self, plans: Sequence[Plan], recoveries: Sequence[Method | None], progress: Progress | None = None
    ) -> list[Candidate]:
        """Try every plan with the first recovery, then the best plan with the others. Returns the candidates, best first."""
        total = len(plans) + len(recoveries) - 1
        candidates: list[Candidate] = []
        for number in counted(progress, "trying", range(total), total):
            if number < len(plans):
                candidates.append(self.of(plans[number], recoveries[0]))
            else:
                best = min(candidates[: len(plans)], key=distance).plan
                candidates.append(self.of(best, recoveries[number - len(plans) + 1]))
        return sorted(candidates, key=distance)

    def of(self, plan: Plan, method: Method | None) -> Candidate:
        """Prune by a plan, recover on some of the examples, and compare the predictions on the others."""
        pruned = prune(self._model, plan)
        if method is not None:
            refit_(self._targets, pruned, method, plan.removed_blocks)
        return Candidate(plan, method, divergence(self._model, pruned, self._task, self._batches, self._logits))


def distance(candidate: Candidate) -> float:
    """The candidate's divergence as a sort key."""
    return candidate.divergence or 0.0
