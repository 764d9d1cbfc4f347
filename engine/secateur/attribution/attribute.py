"""attribute: the scores of every unit of every site, from a task's examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attribution.checkpoint import Checkpoint, digest
from secateur.attribution.criteria import Criterion, GradientActivation, Scorer, criterion_named
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
from secateur_kernels.backend import Backend, uses_triton, using

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
    """Scores each unit of the model by what it does for the task on the examples.

    criterion: GradientActivation() by default; or a name of the command line's, such as "ig:nodes=8". unit, select: as in
    `sites`. max_tokens: padded input tokens in a batch, or in one pass of integrated gradients; it bounds memory and changes
    scores by rounding only. per_example: keep each example's scores too, those that it would have alone. backend: of the
    kernels, "auto" (Triton on CUDA), "reference" or "triton".
    progress: wraps the iteration over this process's batches (given the number of their items).

    checkpoint: a folder for the sums so far and the position in the data. A call that was killed goes on from there when it is
    made again, and returns the same bits; the folder is gone at the end. It is written every ten seconds or more seldom, so
    that it takes a hundredth of the time at most.
    group: processes of torch.distributed, such as `torch.distributed.group.WORLD`, which all make this call with the same
    arguments: the batches are dealt out among them, the float64 sums added up, and each gets the scores, those of one process
    up to the order of summation. Without it, this process does everything, whatever others there are.
    The model runs in eval mode with frozen parameters and is left as it was. Sums over examples are float64.
    Raises InputError, in all processes of the group: unusable examples; a backend that cannot run; activations that are not
    finite; a checkpoint of another model, of other examples or settings, or of another number of processes; a group whose
    processes have different arguments.
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
        with undisturbed(model), torch.enable_grad(), using(backend):
            saved = _checkpoint(model, items, settings, checkpoint, ranks)
            scorer = criterion.scorer(model, task, chosen, max_tokens)
            pilot, checked = _samples(items, max_tokens)
            scorer.prepare(task.collate(pilot, model_device(model)), frozenset(item.row for item in checked), len(rows))
            sums = ScoreSums(model, task, criterion, scorer, chosen, len(rows) if per_example else 0)
            batches = buckets(items, criterion.batch_tokens(max_tokens))
            own = [batches[k] for k in ranks.deal([len(batch) * batch[0].length for batch in batches])]
            sums.add(own, ranks, saved, progress)
            totals, convergence = scorer.finish(sums.totals), scorer.convergence()
    return Scores(
        by_site=totals,
        sites=tuple(chosen),
        all_sites=tuple(layers),
        fingerprint=fingerprint(model),
        criterion=criterion.to_json(),
        examples=len(rows),
        tokens=_mean_tokens(layers, items),
        weights=parameters(model),
        per_example={name: values.float() for name, values in sums.kept.items()} if per_example else None,
        convergence=convergence,
    )


class ScoreSums:
    """The sums over examples, batch by batch: float64 [units] by site in `totals`; in `kept`, for each of `rows` examples."""

    def __init__(
        self, model: nn.Module, task: Task, criterion: Criterion, scorer: Scorer, chosen: list[Site], rows: int
    ) -> None:
        self._model, self._task, self._criterion, self._scorer, self._chosen = model, task, criterion, scorer, chosen
        self.totals = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in chosen}
        # Terms of one example may come from several batches if it is scored for several labels: then their order matters.
        dtype = torch.float64 if criterion.labels == "all" else torch.float32
        self.kept = {site.name: torch.zeros(rows, site.units, dtype=dtype) for site in chosen if rows}
        self.partial = scorer.partial_sums()
        self.partial.sums |= {f"total/{name}": values for name, values in self.totals.items()}
        self.partial.sums |= {f"per_example/{name}": values for name, values in self.kept.items()}

    def add(self, batches: list[list[Item]], ranks: Ranks, saved: Checkpoint | None, progress: Progress | None) -> None:
        """All batches of all processes, these being this one's, but for those that a checkpoint stands in for."""
        if saved is not None:
            saved.restore_(self.partial)
        left, device = batches[self.partial.batches :], model_device(self._model)
        collated = (self._task.collate(batch, device) for batch in ranks.in_step(left))
        for batch in progress(collated, sum(map(len, left))) if progress else collated:
            self._add(batch)
            self.partial.batches += 1
            if saved is not None:
                saved.keep(self.partial)
        ranks.merge_(self.partial)
        if saved is not None:
            saved.remove()

    def _add(self, batch: Batch) -> None:
        for site, scores in self._scorer.scores(batch).items():
            if not torch.isfinite(scores).all():
                raise InputError(_blame(self._model, self._task, batch, self._chosen))
            terms = self._criterion.over(scores.double().cpu())
            self.totals[site.name] += terms.sum(0)
            if self.kept:
                kept = self.kept[site.name]
                kept.index_add_(0, torch.tensor(batch.rows), terms.to(kept.dtype))


def _checkpoint(
    model: nn.Module, items: list[Item], settings: dict[str, Any], folder: str | Path | None, ranks: Ranks
) -> Checkpoint | None:
    """The checkpoint, if there is to be one; for what all processes of a group must have in common."""
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


def _blame(model: nn.Module, task: Task, batch: Batch, chosen: list[Site]) -> str:
    """Which site's activations first are not finite, by one more forward pass."""
    seen: dict[str, bool] = {}

    def look(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, bool(torch.isfinite(arguments[0]).all()))

    handles = []
    for site, branch in branches_of(model, chosen).items():
        handles.append(model.get_submodule(branch.output).register_forward_pre_hook(partial(look, site.name)))
    try:
        with torch.no_grad():
            task.target(model, batch, "log_probability")
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
