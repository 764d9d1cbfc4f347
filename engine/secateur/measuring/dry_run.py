"""dry_run: the sizes that a budget would leave of a model, computed from shapes alone. No weights are needed or read."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.attribution.criteria.gradient_activation import OnePass
from secateur.attribution.pass_tokens import LEAST
from secateur.attribution.scores import Scores, as_scores
from secateur.measuring.synthetic import forward_options, synthetic_batches
from secateur.model import cost
from secateur.model.blocks import block_parameters, blocks
from secateur.model.branches import attentions
from secateur.model.discovery import fingerprint, sites
from secateur.model.families import branches
from secateur.model.images import fixed_length
from secateur.model.offloading import named_parameters
from secateur.model.ordinary import require_model
from secateur.model.removed_blocks import DEEPEST, may_go
from secateur.model.sites import AttentionUnit, Site
from secateur.model.undisturbed import undisturbed
from secateur.planning.budget import Budget
from secateur.planning.plan import Plan, as_plan, plan_within, plans_by_depth
from secateur.pruning.describe import require_all_layers
from secateur.pruning.prune import prune
from secateur.support.compat import TorchDispatchMode, flash_attention, reads_a_value, tree_leaves
from secateur.support.errors import InputError
from secateur.support.html import html_table
from secateur.tasks import Batch
from secateur.tasks.base import target_of
from secateur.tasks.model_config import end_mark

_TARGET_LENGTH = 8


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    Attributes:
        parameters: All parameters.
        layer_parameters: Parameters of the prunable layers.
        weight_bytes: Bytes of the weights, by dtype.
        cache_bytes: Bytes of keys and values for each token of the decoder and, with cross-attention, of the encoder. A sliding
            window, which drops old tokens, is not taken into account.
        flops: FLOPs of one forward pass.
    """

    parameters: int
    layer_parameters: int
    weight_bytes: dict[str, int]
    cache_bytes: dict[str, int]
    flops: int


@dataclass(frozen=True)
class Memory:
    """Peak memory of `attribute` by gradient x activation, in bytes.

    A batch holds `batch_size` unpadded examples of `length` tokens.

    Attributes:
        batch_size: Examples in a batch.
        length: Tokens of an example.
        weights: Bytes of parameters and buffers.
        activations: Bytes of activations and gradients.
        sums: Bytes of the scores' sums.
    """

    batch_size: int
    length: int
    weights: int
    activations: int
    sums: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.activations + self.sums


@dataclass(frozen=True, repr=False)
class DryRun:
    """The result of `dry_run`.

    Attributes:
        plan: The plan.
        shape: Batch size and tokens of the pass whose FLOPs are counted.
        dense: Sizes of the dense model.
        pruned: Sizes of the pruned model.
        attribution: Memory that scoring the dense model takes.
        stock: Whether a stock config describes the pruned model.
    """

    plan: Plan
    shape: tuple[int, int]
    dense: Sizes
    pruned: Sizes
    attribution: Memory
    stock: bool

    def __repr__(self) -> str:
        sizes = "; ".join(f"{name}: {dense} -> {pruned}" for name, dense, pruned in self._rows())
        return f"DryRun({sizes}; {'stock config' if self.stock else 'no stock config'})"

    def _repr_html_(self) -> str:
        config = "a stock config describes" if self.stock else "no stock config describes"
        return html_table(f"dry run; {config} the pruned model", ("", "dense", "pruned"), list(self._rows()))

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield the name of each size with the dense and the pruned model's number."""
        for name in ("parameters", "layer_parameters", "flops"):
            yield name.replace("_", " "), f"{getattr(self.dense, name):,}", f"{getattr(self.pruned, name):,}"

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON document."""
        return {
            "shape": self.shape,
            "dense": asdict(self.dense),
            "pruned": asdict(self.pruned),
            "attribution": {**asdict(self.attribution), "total": self.attribution.total},
            "stock": self.stock,
            "plan": {**self.plan.budget_json(), **self.plan.removed_json()},
            "sites": [{**site.to_json(), "kept": len(self.plan[site.name])} for site in self.plan.sites],
        }


def dry_run(
    model: nn.Module,
    *,
    given: Plan | str | Path | None = None,
    scores: Scores | str | Path | None = None,
    unit: AttentionUnit = "head",
    select: str | None = None,
    batch_size: int = 1,
    length: int = 64,
    max_tokens: int | None = None,
    **planning: Any,
) -> DryRun:
    """Compute the sizes of a model, and the sizes that a plan would leave of it, from shapes alone.

    Without scores, the units that stay are drawn at random, and the allocation must be uniform. FLOPs are then those of
    examples of `length` tokens. With shape "stock", the fewest blocks are removed with which the budget can be met, the last
    ones first. `compress` tries several numbers of blocks, and those whose absence changes the predictions least.

    Args:
        model: A model on the meta device, without weights, as built inside `with torch.device("meta")`. It is not changed.
        given: A plan to carry out, or the path of its file, instead of a budget.
        scores: Scores to plan from, or the path of their file.
        unit: The unit of attention, as in `sites`.
        select: The sites to prune, as in `sites`.
        batch_size: Examples of the pass whose FLOPs are counted.
        length: Tokens of these examples. For a model that reads images, it is the number of tokens that the model makes of an
            image. The memory of `attribute` is also given for this length.
        max_tokens: `max_tokens` of `attribute`, whose memory is computed. None means 4096, as the device is not known.
        planning: A budget, and the other arguments of `plan`; none with `given`.

    Raises:
        InputError: As in `sites`, `plan` and `prune`; or the model has weights, the budget is a measured time, the allocation
            needs scores, or there is a plan and a budget.
    """
    require_model(model)
    given, scores = None if given is None else as_plan(given), None if scores is None else as_scores(scores)
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        raise InputError("model: expected a model on the meta device for a dry run, got one with weights")
    others = [*planning, *(["scores"] if scores is not None else [])]
    if given is not None and others:
        raise InputError(f"given: expected a plan alone, or a budget with arguments of `plan`, got both: {', '.join(others)}")
    budget = None if given is not None else Budget.taken_from(planning)
    if budget is not None and budget.measured:
        raise InputError(
            f"{budget.kind}: expected keep, flops, params or memory in a dry run, which measures no time, got {budget.amount}"
        )
    if given is None and scores is None and planning.get("allocation", "uniform") != "uniform":
        allocation = planning["allocation"]
        raise InputError(
            f"allocation: expected uniform in a dry run without scores, as other allocations need scores, got {allocation!r}"
        )
    prunable = sites(model, unit=unit, select=select)
    length = fixed_length(model) or length
    if budget is not None:
        given = _plan(model, scores or _drawn(model, prunable, length), budget, planning)
    assert given is not None  # The budget is missing only where a plan is given.
    pruned = prune(model, given)
    return DryRun(
        plan=given,
        shape=(batch_size, length),
        dense=sizes_of(model, batch_size, length),
        pruned=sizes_of(pruned, batch_size, length),
        attribution=attribution_memory(model, prunable, max_tokens or LEAST, length),
        stock=not hasattr(pruned.config, "secateur"),
    )


def _plan(model: nn.Module, scores: Scores, budget: Budget, planning: dict[str, Any]) -> Plan:
    """The plan within a budget; with shape "stock", one that removes the fewest blocks."""
    if planning.get("shape") != "stock":
        return plan_within(scores, budget, **planning)
    require_all_layers(model, scores.sites)
    removable: list[str] = []
    for name in reversed(blocks(model)):
        if len(removable) < int(len(blocks(model)) * DEEPEST) and may_go(model, [*removable, name]):
            removable.append(name)
    return next(plans_by_depth(scores, budget, removable, **planning))[0]


def sizes_of(model: nn.Module, batch_size: int, length: int) -> Sizes:
    """Compute the sizes of a model on the meta device, with the FLOPs of a pass of batch_size x length tokens."""
    (inputs,) = synthetic_batches(model, [batch_size], [length], target_length=_TARGET_LENGTH)
    weights = [parameter for _, parameter in named_parameters(model)]
    count, dtype = sum(weight.numel() for weight in weights), weights[0].dtype
    with undisturbed(model), _padded():
        flops = cost.flops(model, {**inputs, **forward_options(model)})
    return Sizes(
        parameters=count,
        layer_parameters=int(sum(site.parameters * site.units for site in sites(model))),
        weight_bytes={_name(dtype): sum(weight.nbytes for weight in weights), "float32": 4 * count, "bfloat16": 2 * count},
        cache_bytes=_cache_bytes(model, dtype),
        flops=flops,
    )


def attribution_memory(model: nn.Module, chosen: Sequence[Site], max_tokens: int, length: int) -> Memory:
    """Compute the peak memory of `attribute` by gradient x activation, for a model on the meta device.

    All examples have the same length.

    The forward and backward pass runs on shapes: `activations` is the most bytes of its intermediate results, gradients
    included, that are alive at once. It does not include the scratch memory of kernels, or what the allocator reserves beyond
    the bytes requested. Attention is counted as a kernel that never writes its probabilities, where the model leaves attention
    to PyTorch.

    Args:
        model: The model.
        chosen: The sites that are scored.
        max_tokens: Padded input tokens in a batch.
        length: Tokens of an example.
    """
    size = max(1, max_tokens // length)
    (inputs,) = synthetic_batches(model, [size], [length], target_length=_TARGET_LENGTH)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = torch.arange(length - min(_TARGET_LENGTH, length), length, device="meta")
    batch = Batch(inputs, torch.empty(0), list(range(size)))
    live = _LiveBytes()
    with undisturbed(model), torch.enable_grad(), _padded(), live:
        OnePass(model, chosen, lambda batch: _target(model, batch)).scores(batch)
    weights = [*(parameter for _, parameter in named_parameters(model)), *model.buffers()]
    units = [site.units for site in chosen]
    # The sums over the examples, and the terms of one site for a batch: both float64.
    sums = 8 * (sum(units) + size * max(units))
    return Memory(size, length, sum(tensor.nbytes for tensor in weights), live.peak, sums)


def _target(model: nn.Module, batch: Batch) -> Tensor:
    """The summed log-probability of label 0 at every position, as a stand-in for a task's target. [batch_size]"""
    logits: Tensor = model(**batch.inputs, **forward_options(model)).logits
    logits = logits if logits.dim() == 3 else logits.unsqueeze(1)
    return target_of(logits, torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device), "log_probability")


def _drawn(model: nn.Module, prunable: Sequence[Site], length: int) -> Scores:
    """Random scores, as if from examples of one length.

    With equal scores, every layer would keep its first units. The plan would then seem to need fewer tables of relative
    positions, or less room in uneven heads, than a real plan.
    """
    generator, all_layers = torch.Generator().manual_seed(0), sites(model)
    over_target = end_mark(model) is None and any(site.stack == "encoder" for site in all_layers)
    return Scores(
        by_site={site.name: torch.randperm(site.units, generator=generator).double() for site in prunable},
        sites=tuple(prunable),
        all_sites=tuple(all_layers),
        fingerprint=fingerprint(model),
        criterion={"criterion": "drawn"},
        examples=0,
        tokens={"encoder": float(length), "decoder": float(_TARGET_LENGTH if over_target else length)},
        weights=cost.parameters(model),
        blocks=block_parameters(model),
    )


def _cache_bytes(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of keys and values in a cache for each token, by the stack of the token."""
    by_stack: dict[str, int] = {}
    for branch in attentions(branches(model).values()):
        if branch.stack == "decoder":
            by_stack[branch.source] = by_stack.get(branch.source, 0) + branch.cached_channels * dtype.itemsize
    return by_stack


def _name(dtype: torch.dtype) -> str:
    """The name of a dtype without the prefix torch."""
    return str(dtype).removeprefix("torch.")


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations inside it create, while they are alive. `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(id(storage))
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._release, id(storage), storage.nbytes())
        self.peak = max(self.peak, self._bytes)
        return result

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._bytes -= size


class _FalseBooleans(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers False where a model inside it tests a boolean tensor on the meta device, which has no value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tests_value = reads_a_value(func) and args[0].device.type == "meta"
        return False if tests_value and args[0].dtype == torch.bool else func(*args, **(kwargs or {}))


class _FusedAttention(TorchFunctionMode):
    """Runs attention on the meta device as one operation, like the kernels of all other devices, not as its plain formula."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention as one fused operation. [B, heads, T, head_dim] -> [B, heads, T, head_dim]"""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return flash_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)


@contextmanager
def _padded() -> Iterator[None]:
    """Make a model on the meta device run as on a padded batch: its test whether all tokens are real returns False."""
    with _FusedAttention(), _FalseBooleans():  # type: ignore[no-untyped-call]
        yield
