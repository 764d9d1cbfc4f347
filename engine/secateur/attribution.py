"""attribute: the scores of every unit of every site, from a task's examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from secateur.cost import parameters
from secateur.criteria import Criterion, GradientActivation
from secateur.data import Example, Examples, read_examples
from secateur.discovery import branches_of, fingerprint, sites
from secateur.errors import InputError
from secateur.gates import undisturbed
from secateur.scores import Scores
from secateur.site import AttentionUnit, Site
from secateur.tasks import Batch, Item, Task
from secateur.tasks.base import model_device
from secateur_kernels.backend import Backend, uses_triton, using

Progress = Callable[[Iterable[Batch], int], Iterable[Batch]]


def attribute(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    criterion: Criterion | None = None,
    unit: AttentionUnit = "head",
    select: str | None = None,
    max_tokens: int = 4096,
    per_example: bool = False,
    backend: Backend = "auto",
    progress: Progress | None = None,
) -> Scores:
    """Scores each unit of the model by what it does for the task on the examples.

    criterion: GradientActivation() by default. unit, select: as in `sites`. max_tokens: padded input tokens in a batch, or in
    one pass of integrated gradients; it bounds memory and changes scores by rounding only. per_example: keep each example's
    scores too, those that it would have alone. backend: of the kernels, "auto" (Triton on CUDA), "reference" or "triton".
    progress: wraps the iteration over batches (given the number of items).
    The model runs in eval mode with frozen parameters and is left as it was. Sums over examples are float64.
    Raises InputError: unusable examples; a backend that cannot run; activations that are not finite.
    """
    criterion = criterion or GradientActivation()
    _require_backend(backend, model)
    chosen = sites(model, unit=unit, select=select)
    rows = read_examples(examples, _columns(task, criterion))
    _require_variety(task, criterion, rows)
    items = task.items(model, rows, all_labels=criterion.labels == "all")
    device = model_device(model)
    totals = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in chosen}
    kept = {site.name: torch.zeros(len(rows), site.units) for site in chosen} if per_example else None
    batches: Iterable[Batch] = task.batches(items, device, criterion.batch_tokens(max_tokens))
    layers = sites(model)
    scorer = criterion.scorer(model, task, chosen, max_tokens)
    with undisturbed(model), torch.enable_grad(), using(backend):
        pilot, checked = _samples(items, max_tokens)
        scorer.prepare(task.collate(pilot, device), frozenset(item.row for item in checked))
        for batch in progress(batches, len(items)) if progress else batches:
            for site, scores in scorer.scores(batch).items():
                if not torch.isfinite(scores).all():
                    raise InputError(_blame(model, task, batch, chosen))
                terms = criterion.over(scores.double().cpu())
                totals[site.name] += terms.sum(0)
                if kept is not None:
                    kept[site.name].index_add_(0, torch.tensor(batch.rows), terms.float())
        totals = scorer.finish(totals)
        convergence = scorer.convergence(len(rows))
    return Scores(
        units=totals,
        sites=tuple(chosen),
        layers=tuple(layers),
        fingerprint=fingerprint(model),
        criterion=criterion.to_json(),
        examples=len(rows),
        tokens=_mean_tokens(layers, items),
        weights=parameters(model),
        per_example=kept,
        convergence=convergence,
    )


def _require_backend(backend: Backend, model: nn.Module) -> None:
    try:
        uses_triton(backend, next(model.parameters()))
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


def _columns(task: Task, criterion: Criterion) -> tuple[str, ...]:
    return task.columns[:1] if criterion.labels == "all" else task.columns


def _require_variety(task: Task, criterion: Criterion, rows: list[Example]) -> None:
    if task.columns[-1] != "target" or criterion.labels == "all" or len(rows) < 2:
        return
    targets = {str(row["target"]) for row in rows}
    if len(targets) < 2 and (task.labels is not None or task.auto_class == "AutoModelForSequenceClassification"):
        raise InputError(f"examples: expected at least two different targets, got {targets.pop()!r} in all {len(rows)} rows")


def _mean_tokens(layers: list[Site], items: list[Item]) -> dict[str, float]:
    """Tokens an example in each stack: a decoder that has an encoder runs over the target, one alone over the input."""
    inputs = sum(len(item.input_ids) for item in items) / len(items)
    targets = sum(len(item.target) for item in items) / len(items)
    has_encoder = any(site.stack == "encoder" for site in layers)
    return {"encoder": inputs, "decoder": targets if has_encoder else inputs}
