"""verify: that the rebuilt model computes what the masked model computes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.model.blocks import gated, layers
from secateur.model.undisturbed import undisturbed
from secateur.planning.plan import Plan
from secateur.pruning.masked import masked
from secateur.tasks import Batch, Task
from secateur.tasks.base import without_targets
from secateur.tasks.batches import model_device

_SLACK = 4.0


class VerificationError(RuntimeError):
    """A pruned model that does not equal the masked one. Nothing that a user does should cause it."""


@dataclass(frozen=True)
class Verification:
    """Largest logit errors against the masked model in a wider dtype (float64, or float32 for half precision).

    error: of the pruned model; rounding: of the masked model itself, which is what the dtype costs anyway;
    difference: between the two; largest: the largest logit.
    """

    error: float
    rounding: float
    difference: float
    largest: float
    dtype: str

    @property
    def holds(self) -> bool:
        """The pruned model is as near to the exact masked model as the masked model in its own dtype: up to a factor 4, and
        the spacing of the dtype's numbers at the largest logit (in float64, where nothing wider is at hand, 1e-12 of it)."""
        spacing = max(torch.finfo(getattr(torch, self.dtype)).eps, 1e-12)
        return self.error <= _SLACK * self.rounding + spacing * self.largest

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        verdict = "equals" if self.holds else "DIFFERS FROM"
        return (
            f"pruned {verdict} masked: largest logit error {self.error:.2e}, rounding of {self.dtype} itself"
            f" {self.rounding:.2e}, largest logit {self.largest:.3g}"
        )


def verify(model: nn.Module, pruned: nn.Module, plan: Plan, task: Task, batches: Iterable[Batch]) -> Verification:
    """Compares the pruned model with the masked one on batches. Holds one copy of the dense model in the wider dtype."""
    return verified(model, pruned, lambda of: masked(of, plan), task, batches)


def verify_layers(
    model: nn.Module,
    deleted: nn.Module,
    gone: Iterable[str],
    task: Task,
    batches: Iterable[Batch],
    *,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Verification:
    """`verify` for `delete_layers`: the masked model is the one where gates on what these layers add are zero, and others their
    factors in `scales`."""
    known = {**layers(model, "block"), **layers(model, "branch")}
    values = {branch: value for name, value in {**scales, **dict.fromkeys(gone, 0.0)}.items() for branch in known[name]}

    def with_gates(of: nn.Module) -> AbstractContextManager[None]:
        return gated(of, {branch: next(of.parameters()).new_tensor([value]) for branch, value in values.items()})

    return verified(model, deleted, with_gates, task, batches)


def verified(
    model: nn.Module,
    pruned: nn.Module,
    mask: Callable[[nn.Module], AbstractContextManager[None]],
    task: Task,
    batches: Iterable[Batch],
) -> Verification:
    """Compares the pruned model with the model inside `mask`, which is its specification, on batches."""
    dtype = next(model.parameters()).dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64
    exact = copy.deepcopy(model).to(wide)
    error = rounding = difference = largest = 0.0
    with undisturbed(model), undisturbed(pruned), undisturbed(exact), torch.inference_mode():
        for batch in batches:
            seen = batch.labels != -100
            expected = _masked_logits(exact, mask, task, batch)[seen].double()
            ours = _masked_logits(model, mask, task, batch)[seen].double()
            theirs = task.logits(pruned, batch)[seen].double()
            error = max(error, float((theirs - expected).abs().max()))
            rounding = max(rounding, float((ours - expected).abs().max()))
            difference = max(difference, float((theirs - ours).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    return Verification(error, rounding, difference, largest, str(dtype).removeprefix("torch."))


def _masked_logits(
    model: nn.Module, mask: Callable[[nn.Module], AbstractContextManager[None]], task: Task, batch: Batch
) -> Tensor:
    with mask(model):
        return task.logits(model, batch)


_VERIFIED_BATCHES = 4


_VERIFIED_TOKENS = 512


def some_batches(model: nn.Module, task: Task, rows: Sequence[Example]) -> list[Batch]:
    """A few small batches of real examples, with all candidate labels where they have no targets."""
    items = task.items(model, list(rows)[:64], all_labels=without_targets(task, rows))
    return list(itertools.islice(task.batches(items, model_device(model), _VERIFIED_TOKENS), _VERIFIED_BATCHES))
