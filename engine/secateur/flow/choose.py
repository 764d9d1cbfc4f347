"""choose: which of several plans and recoveries changes a model least, by trying them on part of the calibration examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attribution.scores import Scores
from secateur.data.examples import Examples, read_examples
from secateur.model.undisturbed import undisturbed
from secateur.planning.allocation import ONE_UNIT, Allocation
from secateur.planning.plan import Plan, plan
from secateur.pruning.prune import prune
from secateur.recovery import Method, recover_
from secateur.support.errors import InputError
from secateur.tasks import Batch, Task
from secateur.tasks.batches import IGNORED, model_device

RECOVERIES: tuple[Method | None, ...] = ("least_squares", "scale", None)
_TRIED = 5  # Every fifth example.
_AT_MOST = 120  # Examples that trying takes: to tell candidates apart needs fewer than to fit the one that is taken.


@dataclass(frozen=True)
class Candidate:
    """A plan with a recovery. divergence: the mean over examples of the Kullback-Leibler divergence of the pruned model's
    predictions from the dense one's, in nats, summed over the target positions; None where there was nothing to compare."""

    plan: Plan
    recovery: Method | None
    divergence: float | None

    def to_json(self) -> dict[str, Any]:
        return {"plan": self.plan.budget, "recovery": self.recovery, "divergence": self.divergence}

    def __str__(self) -> str:
        allocation, floor = (self.plan.budget.get(name) for name in ("allocation", "floor"))
        floored = f" with floor {floor:.2g}" if floor and floor > ONE_UNIT else " with a unit a site" if floor else ""
        far = "" if self.divergence is None else f": {self.divergence:.4f} nats from the dense model"
        return f"allocation {allocation}{floored}, recovery {self.recovery or 'none'}{far}"


def alternatives(
    scores: Scores, *, allocation: Allocation | None = None, floor: float | None = None, **options: Any
) -> list[Plan]:
    """The plans worth trying under one budget: the uniform one, and knapsacks that leave every site at least 0.85 of its share,
    one unit, or nothing.

    allocation, floor: those that are given are not tried but taken. options: the budget and all else that `plan` takes.
    """
    if allocation is not None or options.get("keep") is not None:
        return [plan(scores, allocation=allocation or "uniform", floor=floor or 0.0, **options)]
    uniform = plan(scores, **options)
    share = min(len(uniform[site.name]) / site.units for site in scores.sites)
    floors = (0.85 * share, ONE_UNIT, 0.0) if floor is None else (floor,)
    return [uniform, *(plan(scores, allocation="knapsack", floor=each, **options) for each in floors)]


def choose(
    model: nn.Module,
    task: Task,
    plans: Sequence[Plan],
    examples: Examples,
    *,
    recoveries: Sequence[Method | None] = RECOVERIES,
    unlabeled: bool = False,
    max_tokens: int = 4096,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> list[Candidate]:
    """Every plan with the first recovery, and the best of them with the other recoveries: the candidate that changes the
    predictions least comes first.

    Models are pruned and recovered on four fifths of the examples, 120 of them at most, and their predictions for the other
    fifth compared with the dense model's; equal ones stay in the order given. Where there is one candidate alone, nothing is
    tried. examples, unlabeled, max_tokens: as in `recover_`. progress: wraps the iteration over candidates (given their
    number). The model is untouched.
    Raises InputError: as `prune` and `recover_` do; no plan, no recovery; fewer than two examples.
    """
    if not plans or not recoveries:
        raise InputError(f"plans: expected one at least, and one recovery, got {len(plans)} and {len(recoveries)}")
    total = len(plans) + len(recoveries) - 1
    if total == 1:
        return [Candidate(plans[0], recoveries[0], None)]
    rows = read_examples(examples, task.columns_for(all_labels=unlabeled))[:_AT_MOST]
    if len(rows) < 2:
        raise InputError(f"examples: expected two at least, to fit on one and to compare on the other, got {len(rows)}")
    every = min(_TRIED, len(rows))
    fitted = [row for k, row in enumerate(rows) if k % every]
    items = task.items(model, rows[::every], all_labels=unlabeled)
    batches = list(task.batches(items, model_device(model), max_tokens))
    found: list[Candidate] = []
    for number in progress(range(total), total) if progress else range(total):
        if number < len(plans):
            each, method = plans[number], recoveries[0]
        else:
            each, method = min(found[: len(plans)], key=_distance).plan, recoveries[number - len(plans) + 1]
        pruned = prune(model, each)
        if method is not None:
            recover_(model, pruned, task, fitted, method=method, unlabeled=unlabeled, max_tokens=max_tokens)
        found.append(Candidate(each, method, divergence(model, pruned, task, batches)))
    return sorted(found, key=_distance)


def _distance(candidate: Candidate) -> float:
    return candidate.divergence or 0.0


def divergence(model: nn.Module, pruned: nn.Module, task: Task, batches: Sequence[Batch]) -> float:
    """As in `Candidate`."""
    total, examples = 0.0, 0
    with undisturbed(model), undisturbed(pruned), torch.inference_mode():
        for batch in batches:
            real = batch.labels != IGNORED
            dense, other = (_log_probabilities(task.logits(each, batch)[real]) for each in (model, pruned))
            total += float((dense.exp() * (dense - other)).sum())
            examples += len(batch.labels)
    return total / examples


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)
