"""`attribute`: scores of the units of all sites, from the examples of one task."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attribution.checkpoint import Checkpoint, digest
from secateur.attribution.criteria import (
    Criterion,
    GradientActivation,
    Result,
    ScoringContext,
    TargetCriterion,
    criterion_named,
)
from secateur.attribution.criteria.gradient_activation import OnePass
from secateur.attribution.pass_tokens import pass_tokens
from secateur.attribution.ranks import Ranks
from secateur.attribution.scores import Scores
from secateur.data.examples import Examples
from secateur.model.blocks import block_parameters
from secateur.model.cost import parameters
from secateur.model.discovery import branches_of, fingerprint, scored_ports, sites
from secateur.model.families import branches
from secateur.model.faster_forward import faster_forward
from secateur.model.finite import first_not_finite
from secateur.model.sites import AttentionUnit, Site
from secateur.model.undisturbed import undisturbed
from secateur.support.errors import InputError
from secateur.support.fields import require_count, shown
from secateur.support.progress import Progress, counted
from secateur.support.tensors import on_cpu
from secateur.tasks import Batch, Item, Task
from secateur.tasks.base import require_fit
from secateur.tasks.batches import buckets, model_device
from secateur_kernels.backend import Backend, uses_triton

logger = logging.getLogger("secateur")


@torch.inference_mode(False)  # Gradients are needed, also where the caller needs none.
def attribute(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    criterion: Criterion | str | None = None,
    unit: AttentionUnit = "head",
    select: str | None = None,
    max_tokens: int | None = None,
    per_example: bool = False,
    backend: Backend = "auto",
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Scores:
    """Score each prunable unit of a model by its effect on one task, from a few hundred examples.

    A unit is an FFN neuron, an attention head, or a channel of attention. Give each unit i a gate c_i that multiplies its
    activation at every token. The default criterion, `GradientActivation`, scores the unit by dF/dc_i at c = 1, where F is the
    log-probability of the example's target. It takes one forward and one backward pass a batch. Padded tokens do not count.

    The model runs in eval mode with frozen parameters. Afterwards it is as it was before the call. Sums over examples are
    float64.

    Args:
        model: The dense model.
        task: The task, which turns examples into batches and defines the target F.
        examples: The examples, or a path or name to read them from.
        criterion: How units are scored: a `Criterion`, or a name as on the command line, such as "ig:nodes=8". None means
            `GradientActivation()`.
        unit: The unit of attention: "head", or "channel" for single channels, as in `sites`.
        select: The sites to score, as in `sites`. None scores all sites.
        max_tokens: The most padded input tokens in a batch, or in one pass of integrated gradients. It bounds memory. It
            changes scores by rounding only. None means 4096, but on a GPU a power of two from 4096 to 65536: as many as fit
            into half of its free memory, which one batch shows, and no more than leave each process eight batches. All
            processes, and a call that continues a checkpoint, use one number, which is `Scores.max_tokens`.
        per_example: Whether to keep each example's own scores too: the scores that the example would have alone.
        backend: The implementation of the kernels, for this call alone: "auto" (Triton on CUDA), "reference" or "triton".
        progress: True for a progress bar (tqdm's, a widget in a notebook), or a function of (done, total). It is called with 0
            before the first batch, and then after each batch with the number of this process's items that are scored.
        checkpoint: A folder for the partial sums and the position in the data. If the call is killed, the same call continues
            from there and returns bit-identical scores. The folder is deleted at the end. It is written at most every ten
            seconds, and more rarely if writing would take more than a hundredth of the time.
        group: Processes of torch.distributed, such as `torch.distributed.group.WORLD`. All of them must make this call with
            the same arguments. They share the batches and add up their float64 sums. Each process gets the same scores: the
            scores of a single process up to the order of summation. With None, this process does all the work, even if other
            processes exist.

    Returns:
        The scores: float64 [units] by site name, where a higher score means that the unit is needed more.

    Raises:
        InputError: The examples are unusable, the backend cannot run, activations are not finite, the checkpoint belongs to
            another model, to other examples or settings, or to another number of processes, or the processes of the group
            have different arguments. All processes of the group raise it.

    Example:
        >>> model, tokenizer = secateur.builtin.load()
        >>> task = secateur.TextToText(tokenizer, labels=["good", "bad"])
        >>> examples = secateur.builtin.examples("movie")[:64]
        >>> scores = secateur.attribute(model, task, examples)
        >>> scores["encoder.0.ffn"]  # float64 [units]
        >>> plan = secateur.plan(scores, keep=0.7)

    Reference:
        Yang et al. 2023, arXiv 2205.04157, Eq. 4-6, for the default criterion. Each criterion names its own source.
    """
    criterion = criterion_named(criterion) if isinstance(criterion, str) else criterion
    criterion = GradientActivation() if criterion is None else criterion
    if not isinstance(criterion, Criterion):
        raise InputError(f"criterion: expected a Criterion or the name of one, got {shown(criterion)}")
    if max_tokens is not None:
        require_count("max_tokens", max_tokens)
    ranks = Ranks(group)
    with ranks.agreeing():
        require_fit(task, model)
        _require_backend(backend, model)
        scored_sites, all_sites = sites(model, unit=unit, select=select), sites(model)
        all_labels = criterion.labels == "all"
        rows = task.read(examples, all_labels=all_labels)
        if not all_labels:
            task.require_variety(rows)
        items = task.items(model, rows, all_labels=all_labels)
        logger.info("scoring %d sites by %s on %d examples", len(scored_sites), criterion.to_json()["criterion"], len(rows))
        begun = None if checkpoint is None or max_tokens else Checkpoint.begun_with(Path(checkpoint), "max_tokens")
        own = max_tokens or begun or _pass_tokens(model, task, items, criterion, scored_sites, backend, ranks.size)
        fewest = min(ranks.meet(own))  # All processes meet, also where only some were given a number.
        max_tokens = max_tokens or fewest
        settings = {"criterion": criterion.to_json(), "unit": unit, "select": select, "max_tokens": max_tokens}
        settings |= {"per_example": per_example, "backend": backend}
        with (
            undisturbed(model),
            torch.enable_grad(),
            _checkpoint(model, items, settings, checkpoint, ranks) as saved,
            _passes(model, criterion, scored_sites),
        ):
            pilot_items, checked_items = _samples(items, max_tokens)
            context = ScoringContext(
                model,
                task,
                scored_sites,
                max_tokens,
                pilot=task.collate(pilot_items, model_device(model)),
                examples=len(rows),
                checked=frozenset(item.row for item in checked_items),
                backend=backend,
            )
            result, example_scores = score_batches(criterion, context, items, ranks, saved, progress, per_example=per_example)
    return Scores(
        by_site=result.scores,
        sites=tuple(scored_sites),
        all_sites=tuple(all_sites),
        fingerprint=fingerprint(model),
        criterion=criterion.to_json(),
        examples=len(rows),
        tokens=_mean_tokens(all_sites, items, decodes_target=task.decodes_target),
        weights=parameters(model),
        per_example={name: values.float() for name, values in example_scores.items()} if per_example else None,
        convergence=result.convergence,
        standard_errors=result.standard_errors,
        blocks=block_parameters(model),
        max_tokens=max_tokens,
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
        context: The arguments that the criterion's scorer is built from.
        items: The items of all processes.
        ranks: The processes. Each process scores its own share of the batches.
        saved: The checkpoint. Batches that it already contains are skipped.
        progress: As in `attribute`.
        per_example: Whether to keep each example's scores.

    Returns:
        The result, and the examples' own scores [examples, units] by site name (empty without per_example).

    Raises:
        InputError: A score is not finite, or the checkpoint does not fit.
    """
    sums = _ScoreSums(criterion, context, per_example)
    batches = buckets(items, criterion.batch_tokens(context.max_tokens))
    own_batches = [batches[k] for k in ranks.deal([len(batch) * batch[0].length for batch in batches])]
    if saved is not None:
        saved.restore_(sums.partial)
    remaining, device = own_batches[sums.partial.batches :], model_device(context.model)
    collated = (context.task.collate(batch, device) for batch in ranks.in_step(remaining))
    total = sum(map(len, remaining))
    for batch in counted(progress, "scoring examples", collated, total, lambda batch: len(batch.rows)):
        sums.add(batch)
        if saved is not None:
            saved.keep(sums.partial)
    ranks.merge_(sums.partial)
    if saved is not None:
        saved.remove()
    return sums.scorer.result(sums.totals), sums.example_scores


class _ScoreSums:
    """Sums of scores over examples.

    Attributes:
        totals: Sums over all examples, float64 [units] by site name.
        example_scores: Each example's own scores [examples, units] by site name; empty unless they are kept.
        partial: All tensors that change with the batches, the scorer's included, and the number of batches they contain.
    """

    def __init__(self, criterion: Criterion, context: ScoringContext, per_example: bool) -> None:
        self._criterion, self._context, self.scorer = criterion, context, criterion.scorer(context)
        self.totals = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in context.sites}
        # An example that is scored for several labels may get terms from several batches. In float32 their order would matter.
        dtype = torch.float64 if criterion.labels == "all" else torch.float32
        scored = context.sites if per_example else ()
        self.example_scores = {site.name: torch.zeros(context.examples, site.units, dtype=dtype) for site in scored}
        self.partial = self.scorer.partial_sums()
        self.partial.sums |= {f"total/{name}": values for name, values in self.totals.items()}
        self.partial.sums |= {f"per_example/{name}": values for name, values in self.example_scores.items()}

    def add(self, batch: Batch) -> None:
        """Add the scores of a batch. Raise InputError if a score is not finite."""
        by_site = {site: scores.double() for site, scores in self.scorer.scores(batch).items()}  # [B, units]
        terms = [self._criterion.over(scores) for scores in by_site.values()]
        if not self.example_scores:
            terms = [of_site.sum(0, keepdim=True) for of_site in terms]  # [1, units]
        # One transfer for all sites, because each one waits for the device. Sums tell whether all scores are finite.
        moved = on_cpu([*terms, *(scores.sum() for scores in by_site.values())])
        if not torch.isfinite(torch.stack(moved[len(terms) :])).all():
            raise InputError(_not_finite_message(self._context, batch))
        for site, of_site in zip(by_site, moved, strict=False):
            self.totals[site.name] += of_site.sum(0)
            if self.example_scores:
                rows = self.example_scores[site.name]  # [examples, units]
                rows.index_add_(0, torch.tensor(batch.rows), of_site.to(rows.dtype))
        self.partial.batches += 1


def _passes(model: nn.Module, criterion: Criterion, scored_sites: Sequence[Site]) -> AbstractContextManager[None]:
    """A context in which the model runs in fewer operations, where a criterion needs the target's derivatives alone.

    The last block may then leave out tokens that no head reads. The target has no gradient there, so they add nothing to a
    score. Criteria that sum up activations need all tokens.
    """
    if not isinstance(criterion, TargetCriterion):
        return nullcontext()
    watched = {port.path for ports in scored_ports(model, scored_sites).values() for port in ports}
    # A replay of a decoder's layers reads the keys and values of the encoder's states in place of the states.
    return faster_forward(model, watched | {path for branch in branches(model).values() for path in branch.source_linears})


def _pass_tokens(
    model: nn.Module,
    task: Task,
    items: list[Item],
    criterion: Criterion,
    scored_sites: Sequence[Site],
    backend: Backend,
    processes: int,
) -> int:
    """Return the tokens of a pass that suit this process's device. Other criteria take about as much as one gradient pass."""

    def run(batch: Batch) -> None:
        with undisturbed(model), torch.enable_grad(), _passes(model, criterion, scored_sites):
            OnePass(model, scored_sites, partial(task.target, model, kind="log_probability"), backend=backend).scores(batch)

    return pass_tokens(model, task, items, run, batch_tokens=criterion.batch_tokens, processes=processes)


@contextmanager
def _checkpoint(
    model: nn.Module, items: list[Item], settings: dict[str, Any], folder: str | Path | None, ranks: Ranks
) -> Iterator[Checkpoint | None]:
    """Open the checkpoint; None if the caller wants none. Raise an error if processes of the group have other settings."""
    if folder is not None or ranks.size > 1:
        settings = {**digest(model, items), **settings}
        ranks.require_same(settings)
    if folder is None:
        yield None
        return
    with closing(Checkpoint(folder, settings, ranks.rank, ranks.size)) as saved:
        yield saved


def _require_backend(backend: Backend, model: nn.Module) -> None:
    """Raise InputError if the backend cannot run on the model's device and dtype."""
    try:
        uses_triton(backend, torch.empty(0, device=model_device(model), dtype=next(model.parameters()).dtype))
    except ValueError as error:
        raise InputError(str(error)) from None


def _not_finite_message(context: ScoringContext, batch: Batch) -> str:
    """Return an error message that names the first site with activations that are not finite, by one more forward pass."""
    layers = {site.name: branch.output for site, branch in branches_of(context.model, context.sites).items()}
    run = partial(context.task.target, context.model, batch, "log_probability")
    if (name := first_not_finite(context.model, layers, run)) is not None:
        return f"model: activations of site {name!r} are not finite (NaN or inf); is the dtype too narrow?"
    return "model: the target or its gradient is not finite (NaN or inf), though all sites' activations are"


def _samples(items: list[Item], max_tokens: int) -> tuple[list[Item], list[Item]]:
    """Return two disjoint samples of items of all lengths: the pilot's, and the checked ones.

    Each has a thirty-second of the items, but four at least and eight at most, no more than half of the items, and no more than
    fit into max_tokens.
    """
    by_length = sorted(items, key=lambda item: item.length)
    count = max(1, min(max(4, len(items) // 32), 8, len(items) // 2, max_tokens // by_length[-1].length))
    picked = [by_length[k * len(items) // (2 * count)] for k in range(2 * count)]
    return picked[::2], picked[1::2]


def _mean_tokens(all_sites: list[Site], items: list[Item], *, decodes_target: bool) -> dict[str, float]:
    """Return the mean tokens of an example in each stack. A decoder that has an encoder may run over the target."""
    inputs = sum(item.tokens for item in items) / len(items)
    targets = sum(len(item.target) for item in items) / len(items)
    over_target = decodes_target and any(site.stack == "encoder" for site in all_sites)
    return {"encoder": inputs, "decoder": targets if over_target else inputs}
