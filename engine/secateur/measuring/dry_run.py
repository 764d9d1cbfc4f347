"""dry_run: what a budget would leave of a model, found from its shapes alone: no weight is needed, nor looked at."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.attribution.criteria.gradient_activation import OnePass
from secateur.attribution.scores import Scores
from secateur.measuring.synthetic import forward_options, synthetic_batches
from secateur.model import cost
from secateur.model.branches import attentions
from secateur.model.discovery import fingerprint, sites
from secateur.model.families import branches
from secateur.model.images import fixed_length
from secateur.model.offloading import named_parameters
from secateur.model.sites import AttentionUnit, Site
from secateur.model.undisturbed import undisturbed
from secateur.planning.budget import Budget
from secateur.planning.plan import Plan, plan_within
from secateur.pruning.prune import prune
from secateur.support.compat import TorchDispatchMode, flash_attention, reads_a_value, tree_leaves
from secateur.support.errors import InputError
from secateur.tasks import Batch
from secateur.tasks.base import target_of

_TARGET_LENGTH = 8


@dataclass(frozen=True)
class Sizes:
    """A model's sizes. layer_parameters: of its prunable layers. cache_bytes: of keys and values, for each token of the decoder
    and, with cross-attention, of the encoder; a window that forgets tokens is not counted. flops: of one forward pass."""

    parameters: int
    layer_parameters: int
    weight_bytes: dict[str, int]
    cache_bytes: dict[str, int]
    flops: int


@dataclass(frozen=True)
class Memory:
    """Bytes that `attribute` by gradient x activation holds at its peak, in all and by what holds them, where a batch is
    `batch_size` unpadded examples of `length` tokens."""

    batch_size: int
    length: int
    weights: int
    activations: int
    sums: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.sums


@dataclass(frozen=True)
class DryRun:
    """What `dry_run` found. shape: batch size and tokens of the pass whose FLOPs are counted. stock: whether a stock config
    describes the pruned model."""

    plan: Plan
    shape: tuple[int, int]
    dense: Sizes
    pruned: Sizes
    attribution: Memory
    stock: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "dense": asdict(self.dense),
            "pruned": asdict(self.pruned),
            "attribution": {**asdict(self.attribution), "total": self.attribution.total},
            "stock": self.stock,
            "plan": self.plan.summary(),
            "sites": [{**site.to_json(), "kept": len(self.plan[site.name])} for site in self.plan.sites],
        }


def dry_run(
    model: nn.Module,
    *,
    given: Plan | None = None,
    scores: Scores | None = None,
    unit: AttentionUnit = "head",
    select: str | None = None,
    batch_size: int = 1,
    length: int = 64,
    max_tokens: int = 4096,
    **planning: Any,
) -> DryRun:
    """The sizes of a model and of what a plan would leave of it, from shapes alone.

    model: on the meta device, without weights, as made inside `with torch.device("meta")`. It is untouched.
    planning: a budget and what else `plan` takes. Without scores those that stay are drawn, and the allocation must be uniform;
    FLOPs are then those of examples of `length` tokens. given: a plan to carry out instead. batch_size, length: of the pass
    whose FLOPs are counted. max_tokens: of `attribute`, whose memory is told for examples of `length` tokens, or
    of as many as a model makes of an image.
    Raises InputError: as `sites`, `plan` and `prune` do; a model with weights; a budget of measured time; an allocation that
    needs scores.
    """
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        raise InputError("model: expected one on the meta device for a dry run, got one with weights")
    budget = None if given is not None else Budget.taken_from(planning)
    if budget is not None and budget.measured:
        raise InputError(
            f"{budget.kind}: expected keep, flops, params or memory in a dry run, which times nothing, got {budget.amount}"
        )
    if given is None and scores is None and planning.get("allocation", "uniform") != "uniform":
        named = planning["allocation"]
        raise InputError(f"allocation: expected uniform in a dry run without scores, which others need, got {named!r}")
    chosen = sites(model, unit=unit, select=select)
    length = fixed_length(model) or length
    if budget is not None:
        given = plan_within(scores or _drawn(model, chosen, length), budget, **planning)
    assert given is not None  # The budget is missing only where a plan is given.
    pruned = prune(model, given)
    return DryRun(
        plan=given,
        shape=(batch_size, length),
        dense=sizes_of(model, batch_size, length),
        pruned=sizes_of(pruned, batch_size, length),
        attribution=attribution_memory(model, chosen, max_tokens, length),
        stock=not hasattr(pruned.config, "secateur"),
    )


def sizes_of(model: nn.Module, batch_size: int, length: int) -> Sizes:
    """The sizes of a model on the meta device, with the FLOPs of a pass of this shape."""
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
    """What `attribute` by gradient x activation holds at its peak of a model on the meta device, at examples of one length.

    Its forward and backward pass is run on shapes: `activations` is the most that is alive at once of what it makes, with the
    gradients. What kernels use inside for a moment is not in it, nor is what the allocator holds beyond what was asked for.
    Attention counts as by a kernel that never writes its probabilities, where the model leaves that to PyTorch.
    """
    size = max(1, max_tokens // length)
    (inputs,) = synthetic_batches(model, [size], [length], target_length=_TARGET_LENGTH)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = torch.arange(length - min(_TARGET_LENGTH, length), length, device="meta")
    batch = Batch(inputs, torch.empty(0), list(range(size)))
    live = _Live()
    with undisturbed(model), torch.enable_grad(), _padded(), live:
        OnePass(model, chosen, lambda batch: _target(model, batch)).scores(batch)
    held = [*(parameter for _, parameter in named_parameters(model)), *model.buffers()]
    units = [site.units for site in chosen]
    # The sums over examples, and one site's terms: both float64.
    sums = 8 * (sum(units) + size * max(units))
    return Memory(size, length, sum(tensor.nbytes for tensor in held), live.peak, sums)


def _target(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**batch.inputs, **forward_options(model)).logits
    logits = logits if logits.dim() == 3 else logits.unsqueeze(1)
    return target_of(logits, torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device), "log_probability")


def _drawn(model: nn.Module, chosen: Sequence[Site], length: int) -> Scores:
    """Scores drawn at random, as of examples of one length. Were all alike, every layer would keep its first units, so that a
    plan would seem to need fewer tables of relative positions, or less room in uneven heads, than any real one."""
    generator, layers = torch.Generator().manual_seed(0), sites(model)
    has_encoder = any(site.stack == "encoder" for site in layers)
    return Scores(
        by_site={site.name: torch.randperm(site.units, generator=generator).double() for site in chosen},
        sites=tuple(chosen),
        all_sites=tuple(layers),
        fingerprint=fingerprint(model),
        criterion={"criterion": "drawn"},
        examples=0,
        tokens={"encoder": float(length), "decoder": float(_TARGET_LENGTH if has_encoder else length)},
        weights=cost.parameters(model),
    )


def _cache_bytes(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Keys and values that a cache holds for each token, by the stack whose tokens they are."""
    sizes: dict[str, int] = {}
    for branch in attentions(branches(model).values()):
        if branch.stack == "decoder":
            sizes[branch.source] = sizes.get(branch.source, 0) + branch.cached_channels * dtype.itemsize
    return sizes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, counts the bytes of the tensors that operations make, while they are alive; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(id(storage))
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._release, id(storage), storage.nbytes())
        self.peak = max(self.peak, self._bytes)
        return found

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._bytes -= size


class _Untold(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, a question that a model asks of values which the meta device does not have is answered with no."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = reads_a_value(func) and args[0].device.type == "meta"
        return False if asked and args[0].dtype == torch.bool else func(*args, **(kwargs or {}))


class _Fused(TorchFunctionMode):
    """Inside, attention on the meta device is one operation, as in the kernels of every other device, not its plain formula."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return flash_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)


@contextmanager
def _padded() -> Iterator[None]:
    """Inside, a model on the meta device runs as on a batch with padding: whether all tokens are real, it is told no."""
    with _Fused(), _Untold():  # type: ignore[no-untyped-call]
        yield
