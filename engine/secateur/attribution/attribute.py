"""attribute: the scores of every unit of every site, from a task's examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attribution.checkpoint import Checkpoint, digest
from secateur.attribution.criteria import Criterion, GradientActivation, Result, ScoringContext, criterion_named
from secateur.attribution.ranks import Ranks
from secateur.attribution.scores import Scores
from secateur.data.examples import Examples, read_examples
from secateur.model.cost import parameters
from secateur.model.discovery import branches_of, fingerprint, sites
from secateur.model.sites import AttentionUnit, Site
from secateur.model.undisturbed import undisturbed
from secateur.support.errors import InputError
from secateur.tasks import Batch, Item, Task
from secateur.tasks.batches import buckets, model_device
from secateur_kernels.backend import Backend, uses_triton

Progress = Callable[[Iterable[Batch], int], Iterable[Batch]]


def attribute(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    criterion: Criterion | str | None = None,
    unit: AttentionUnit = "head",
    select: str | None = None,
    max_tokens: int = 4096,
    per_example: bool = False,
    backend: Backend = "auto",
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Scores:
    """Score each unit of the model by what it does for the task on the examples.

    The model runs in eval mode with frozen parameters and is left as it was. Sums over examples are float64.

    Args:
        model: The model.
        task: The task.
        examples: The examples, or where to read them.
        criterion: How units are scored: a criterion, or a name of the command line's, such as "ig:nodes=8". None:
            `GradientActivation()`.
        unit: The unit of attention, as in `sites`.
        select: Which sites to score, as in `sites`.
        max_tokens: The most padded input tokens in a batch, or in one pass of integrated gradients. It bounds memory, and
            changes scores by rounding only.
        per_example: Keep each example's scores too: those that the example would have alone.
        backend: Of the kernels, for this call alone: "auto" (Triton on CUDA), "reference" or "triton".
        progress: Wraps the iteration over this process's batches (given the number of their items).
        checkpoint: A folder for the sums so far and the position in the data. A killed call goes on from there when it is made
            again, and returns the same bits. The folder is gone at the end. It is written every ten seconds or more seldom, so
            that writing takes a hundredth of the time at most.
        group: Processes of torch.distributed, such as `torch.distributed.group.WORLD`, which all make this call with the same
            arguments. The batches are dealt out among them and the float64 sums are added up. Each process gets the same
            scores: those of one process up to the order of summation. None: this process does everything, whatever others
            there are.

    Raises:
        InputError: In all processes of the group: the examples are unusable, the backend cannot run, activations are not
            finite, the checkpoint is of another model, of other examples or settings, or of another number of processes, or
            the group's processes have different arguments.
    """
    criterion = criterion_named(criterion) if isinstance(criterion, str) else criterion or GradientActivation()
    ranks = Ranks(group)
    with ranks.agreeing():
        _require_backend(backend, model)
        task.require_fit(model)
        chosen, layers = sites(model, unit=unit, select=select), sites(model)
        all_labels = criterion.labels == "all"
        rows = read_examples(examples, task.columns_for(all_labels=all_labels))
        if not all_labels:
            task.require_variety(rows)
        items = task.items(model, rows, all_labels=all_labels)
        settings = {"criterion": criterion.to_json(), "unit": unit, "select": select, "max_tokens": max_tokens}
        settings |= {"per_example": per_example, "backend": backend}
        with undisturbed(model), torch.enable_grad():
            saved = _checkpoint(model, items, settings, checkpoint, ranks)
            pilot, checked = _samples(items, max_tokens)
            context = ScoringContext(
                model,
                task,
                chosen,
                max_tokens,
                pilot=task.collate(pilot, model_device(model)),
                examples=len(rows),
                checked=frozenset(item.row for item in checked),
                backend=backend,
            )
            result, kept = score_batches(criterion, context, items, ranks, saved, progress, per_example=per_example)
    return Scores(
        by_site=result.scores,
        sites=tuple(chosen),
        all_sites=tuple(layers),
        fingerprint=fingerprint(model),
        criterion=criterion.to_json(),
        examples=len(rows),
        tokens=_mean_tokens(layers, items),
        weights=parameters(model),
        per_example={name: values.float() for name, values in kept.items()} if per_example else None,
        convergence=result.convergence,
    )


def score_batches(
    criterion: Criterion,
    context: ScoringContext,
    items: list[Item],
    ranks: Ranks,
    saved: Checkpoint | None = None,
    progress: Progress | None = None,
    *,
    per_example: bool = False,
) -> tuple[Result, dict[str, Tensor]]:
    """Score all items by a criterion. This function alone knows in which order a scorer's methods are called.

    Args:
        criterion: The criterion.
        context: What the criterion's scorer is built of.
        items: The items of all processes.
        ranks: The processes. Each scores its own share of the batches.
        saved: The checkpoint, which stands in for the batches that it has.
        progress: As in `attribute`.
        per_example: Whether to keep each example's scores.

    Returns:
        The result, and the examples' own scores [examples, units] by site name (empty without per_example).
    """
    sums = _ScoreSums(criterion, context, per_example)
    batches = buckets(items, criterion.batch_tokens(context.max_tokens))
    own = [batches[k] for k in ranks.deal([len(batch) * batch[0].length for batch in batches])]
    if saved is not None:
        saved.restore_(sums.partial)
    left, device = own[sums.partial.batches :], model_device(context.model)
    collated = (context.task.collate(batch, device) for batch in ranks.in_step(left))
    for batch in progress(collated, sum(map(len, left))) if progress else collated:
        sums.add(batch)
        if saved is not None:
            saved.keep(sums.partial)
    ranks.merge_(sums.partial)
    if saved is not None:
        saved.remove()
    return sums.scorer.result(sums.totals), sums.kept


class _ScoreSums:
    """Sums over examples: float64 [units] by site name in `totals`, and each example's own [examples, units] in `kept`.

    partial: all tensors that change with the batches, among them the scorer's, and how many batches they hold.
    """

    def __init__(self, criterion: Criterion, context: ScoringContext, per_example: bool) -> None:
        self._criterion, self._context, self.scorer = criterion, context, criterion.scorer(context)
        self.totals = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in context.sites}
        # Terms of one example may come from several batches if it is scored for several labels: then their order matters.
        dtype = torch.float64 if criterion.labels == "all" else torch.float32
        scored = context.sites if per_example else ()
        self.kept = {site.name: torch.zeros(context.examples, site.units, dtype=dtype) for site in scored}
        self.partial = self.scorer.partial_sums()
        self.partial.sums |= {f"total/{name}": values for name, values in self.totals.items()}
        self.partial.sums |= {f"per_example/{name}": values for name, values in self.kept.items()}

    def add(self, batch: Batch) -> None:
        """Add the scores of a batch. Raises InputError if one of them is not finite."""
        for site, scores in self.scorer.scores(batch).items():
            if not torch.isfinite(scores).all():
                raise InputError(_blame(self._context, batch))
            terms = self._criterion.over(scores.double().cpu())
            self.totals[site.name] += terms.sum(0)
            if self.kept:
                kept = self.kept[site.name]
                kept.index_add_(0, torch.tensor(batch.rows), terms.to(kept.dtype))
        self.partial.batches += 1


def _checkpoint(
    model: nn.Module, items: list[Item], settings: dict[str, Any], folder: str | Path | None, ranks: Ranks
) -> Checkpoint | None:
    """Return the checkpoint, if the caller wants one. Require the same settings of all processes of a group."""
    if folder is None and ranks.size == 1:
        return None
    settings = {**digest(model, items), **settings}
    ranks.require_same(settings)
    return None if folder is None else Checkpoint(folder, settings, ranks.rank, ranks.size)


def _require_backend(backend: Backend, model: nn.Module) -> None:
    try:
        uses_triton(backend, torch.empty(0, device=model_device(model), dtype=next(model.parameters()).dtype))
    except ValueError as error:
        raise InputError(str(error)) from None


def _blame(context: ScoringContext, batch: Batch) -> str:
    """Say which site is the first whose activations are not finite, by one more forward pass."""
    seen: dict[str, bool] = {}

    def look(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, bool(torch.isfinite(arguments[0]).all()))

    handles = []
    for site, branch in branches_of(context.model, context.sites).items():
        handles.append(context.model.get_submodule(branch.output).register_forward_pre_hook(partial(look, site.name)))
    try:
        with torch.no_grad():
            context.task.target(context.model, batch, "log_probability")
    finally:
        for handle in handles:
            handle.remove()
    for name, finite in seen.items():
        if not finite:
            return f"model: activations of site {name!r} are not finite (NaN or inf); is the dtype too narrow?"
    return "model: the target or its gradient is not finite (NaN or inf), though all sites' activations are"


def _samples(items: list[Item], max_tokens: int) -> tuple[list[Item], list[Item]]:
    """Two samples of a thirty-second of the items each, four to eight of them within max_tokens, from all lengths."""
    by_length = sorted(items, key=lambda item: item.length)
    count = max(1, min(max(4, len(items) // 32), 8, len(items) // 2, max_tokens // by_length[-1].length))
    picked = [by_length[k * len(items) // (2 * count)] for k in range(2 * count)]
    return picked[::2], picked[1::2]


def _mean_tokens(layers: list[Site], items: list[Item]) -> dict[str, float]:
    """Tokens an example in each stack: a decoder that has an encoder runs over the target, one alone over the input."""
    inputs = sum(item.tokens for item in items) / len(items)
    targets = sum(len(item.target) for item in items) / len(items)
    has_encoder = any(site.stack == "encoder" for site in layers)
    return {"encoder": inputs, "decoder": targets if has_encoder else inputs}
