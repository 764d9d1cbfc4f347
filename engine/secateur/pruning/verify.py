"""verify: check that the rebuilt model computes what the masked model computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.model.blocks import gated, layers
from secateur.model.branches import attentions
from secateur.model.families import branches
from secateur.model.offloading import copy_of, require_values
from secateur.model.ordinary import require_model
from secateur.model.undisturbed import undisturbed
from secateur.planning.plan import Plan, as_plan
from secateur.pruning.masked import masked
from secateur.support.compat import attention_implementation
from secateur.support.errors import InputError
from secateur.tasks import Batch, Task
from secateur.tasks.base import without_targets
from secateur.tasks.batches import model_device

_SLACK = 4.0
_VERIFIED_BATCHES, _VERIFIED_TOKENS = 4, 512


@dataclass(frozen=True)
class Verification:
    """Largest logit errors against the masked model in a wider dtype (float64, or float32 for half precision).

    Attributes:
        error: The error of the pruned model.
        rounding: The error of the masked model in its own dtype, which is what the dtype costs anyway.
        difference: The largest difference between the pruned and the masked model, both in their own dtype.
        largest: The largest logit.
        dtype: The name of the model's dtype.
    """

    error: float
    rounding: float
    difference: float
    largest: float
    dtype: str

    @property
    def holds(self) -> bool:
        """Whether the pruned model is as near to the exact masked model as the masked model in its own dtype is.

        Allowed are a factor 4 and the spacing of the dtype's numbers at the largest logit. For float64, which has no wider
        dtype, it is 1e-12 of the largest logit.
        """
        spacing = max(torch.finfo(getattr(torch, self.dtype)).eps, 1e-12)
        return self.error <= _SLACK * self.rounding + spacing * self.largest

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        verdict = "equals" if self.holds else "DIFFERS FROM"
        return (
            f"pruned {verdict} masked: largest logit error {self.error:.2e}, rounding of {self.dtype} itself"
            f" {self.rounding:.2e}, largest logit {self.largest:.3g}"
        )


def verify(model: nn.Module, pruned: nn.Module, plan: Plan | str | Path, task: Task, batches: Iterable[Batch]) -> Verification:
    """Compare the pruned model with the masked one on batches.

    It holds one copy of the dense model in the wider dtype.

    Args:
        model: The dense model.
        pruned: The pruned model.
        plan: The plan that the pruned model was made by, or the path of its file.
        task: The task whose logits are compared, at the positions of the batches' labels.
        batches: The batches.

    Raises:
        InputError: Logits are NaN or inf, or there is nothing to compare, or a model has weights without values.
    """
    carried_out = as_plan(plan)
    return verified(model, pruned, lambda dense: masked(dense, carried_out), task, batches)


def verify_layers(
    model: nn.Module,
    deleted: nn.Module,
    gone: Iterable[str],
    task: Task,
    batches: Iterable[Batch],
    *,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Verification:
    """Compare a model without some layers with the masked model, as `verify` does for pruned units.

    In the masked model, gates on the outputs of the deleted layers are zero, and others are their factors in `scales`.

    Args:
        model: The dense model.
        deleted: The model that `delete_layers` made.
        gone: The names of the deleted layers, as in `delete_layers`.
        task: The task whose logits are compared.
        batches: The batches.
        scales: The factors by name, as in `delete_layers`.
    """
    known = {**layers(model, "block"), **layers(model, "branch")}
    gone = list(gone)
    if unknown := [name for name in (*gone, *scales) if name not in known]:
        raise InputError(f"gone: expected some of {', '.join(known)}, got {unknown[0]!r}")
    values = {branch: value for name, value in {**scales, **dict.fromkeys(gone, 0.0)}.items() for branch in known[name]}

    def with_gates(dense: nn.Module) -> AbstractContextManager[None]:
        return gated(dense, {branch: next(dense.parameters()).new_tensor([value]) for branch, value in values.items()})

    return verified(model, deleted, with_gates, task, batches)


def verified(
    model: nn.Module,
    pruned: nn.Module,
    mask: Callable[[nn.Module], AbstractContextManager[None]],
    task: Task,
    batches: Iterable[Batch],
) -> Verification:
    """Compare the pruned model on batches with the dense model inside the context `mask`, which is its specification.

    Raises:
        InputError: As `verify`.
    """
    for name, checked in (("model", model), ("pruned", pruned)):
        require_model(checked)
        require_values(checked, name)
    dtype, exact = next(model.parameters()).dtype, in_wider_dtype(model)
    error = rounding = difference = largest = 0.0
    compared = 0
    with undisturbed(model), undisturbed(pruned), undisturbed(exact), torch.inference_mode():
        for batch in batches:
            seen = batch.labels != -100
            compared += int(seen.sum())
            expected = _masked_logits(exact, mask, task, batch)[seen].double()
            ours = _masked_logits(model, mask, task, batch)[seen].double()
            theirs = task.logits(pruned, batch)[seen].double()
            for name, logits in (("masked", expected), ("masked", ours), ("pruned", theirs)):
                if not torch.isfinite(logits).all():
                    raise InputError(f"model: the {name} model's logits are not finite (NaN or inf){_reason(model, dtype)}")
            error = max(error, float((theirs - expected).abs().max()))
            rounding = max(rounding, float((ours - expected).abs().max()))
            difference = max(difference, float((theirs - ours).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    if not compared:
        raise InputError("batches: expected a batch with targets, got none (a generator of batches serves one call alone)")
    return Verification(error, rounding, difference, largest, str(dtype).removeprefix("torch."))


def in_wider_dtype(model: nn.Module) -> Any:
    """Return a copy of a model that computes in float64, or in float32 where the model has half precision."""
    dtype = next(model.parameters()).dtype
    exact = copy_of(model).to(torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64)
    for module in exact.modules():
        if hasattr(module, "reorder_and_upcast_attn"):  # GPT-2's way to compute attention in float32, which fails in float64.
            vars(module)["reorder_and_upcast_attn"] = False
    _bound_masks_(exact)
    return exact


def _bound_masks_(model: nn.Module) -> None:
    """Keep the masks of a float64 model's attentions within the range of float32, by hooks.

    transformers' eager attention converts scores to float32 before the softmax. There a mask of float64's smallest number is
    -inf, and a token whose keys are all masked gives NaN: padding beyond a sliding window. In the layers after it, NaN spreads
    to all tokens.
    """

    def bounded(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dtype == torch.float64:
            named = {**named, "attention_mask": mask.clamp(min=torch.finfo(torch.float32).min)}
        return arguments, named

    for attention in attentions(branches(model).values()):
        model.get_submodule(attention.path).register_forward_pre_hook(bounded, with_kwargs=True)


def _reason(model: nn.Module, dtype: torch.dtype) -> str:
    """Words on why the logits of a model of this dtype may be NaN, and what to do."""
    config = getattr(model, "config", None)
    windows = getattr(config, "sliding_window", None) is not None and attention_implementation(config) == "eager"
    if dtype == torch.float64 and windows:
        return (
            "; transformers' eager attention gives NaN in float64 for padding beyond a sliding window: load the model in "
            "float32, or with attn_implementation='sdpa'"
        )
    return "; is the dtype too narrow?"


def _masked_logits(
    model: nn.Module, mask: Callable[[nn.Module], AbstractContextManager[None]], task: Task, batch: Batch
) -> Tensor:
    """Return the logits of the model inside the context `mask`."""
    with mask(model):
        return task.logits(model, batch)


def some_batches(model: nn.Module, task: Task, rows: Sequence[Example]) -> list[Batch]:
    """Return a few small batches of real examples, with all candidate labels where the examples have no targets."""
    items = task.items(model, list(rows)[:64], all_labels=without_targets(task, rows))
    return list(itertools.islice(task.batches(items, model_device(model), _VERIFIED_TOKENS), _VERIFIED_BATCHES))
