"""MultitaskPruning: one encoder, pruned to a density while it is fine-tuned on several tasks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.learned.multitask.budget import Scope, choose, require_reachable
from secateur.learned.multitask.encoder_tasks import EncoderTask
from secateur.learned.multitask.model import MultitaskModel, Pooling, encoder_of
from secateur.learned.multitask.parametrizations import MASKS, Granularity, Mask, Method
from secateur.learned.multitask.schedule import CubicSchedule
from secateur.model.families import branches
from secateur.support.errors import InputError


class MultitaskPruning(MultitaskModel):
    """Pruning with a multitask objective (Xia and Shin 2021, arXiv 2112.05705), to be trained by `secateur.learned.train`.

    model: an encoder of a known family (BERT and kin, T5 and kin), or a model that has one; it is copied, and what is given
    stays as it is. tasks: by name; each has an unpruned head of its own.
    method: "magnitude", or "movement" (scores that learn). granularity: "element" (W * M) or "rank" (U (s * M) V, of a singular
    value decomposition in float32). scope: "global" ranks the entries of all matrices together, "local" gives each matrix the
    same share. density: of the weights of the linear layers in the encoder's blocks, as they are stored (a rank of an m x n
    matrix as m + n, a matrix as m * n at most); biases, norms, embeddings and heads are not pruned and not counted.
    schedule: how the density falls over training. initial_scores: by linear layer, of the shape of its entries, instead of
    zeros (movement only; see `attribution_scores`). pooling: what a head reads, "mean" or "first".
    Raises InputError: unknown settings; a density that cannot be reached, with the nearest; scores that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, EncoderTask],
        *,
        method: Method = "movement",
        granularity: Granularity = "element",
        scope: Scope = "global",
        density: float = 0.1,
        schedule: CubicSchedule | None = None,
        initial_scores: Mapping[str, Tensor] | None = None,
        pooling: Pooling = "mean",
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        for name, value, known in (
            ("method", method, ("magnitude", "movement")),
            ("granularity", granularity, tuple(MASKS)),
            ("scope", scope, ("global", "local")),
        ):
            if value not in known:
                raise InputError(f"{name}: expected {' or '.join(known)}, got {value!r}")
        super().__init__(copy.deepcopy(encoder_of(model)), tasks, pooling=pooling, dropout=dropout, seed=seed)
        self.method, self.granularity, self.scope, self.density = method, granularity, scope, density
        self.schedule = schedule or CubicSchedule()
        # In forward order; once a weight is masked, it is no parameter that a family could look at.
        self.linears = [path for branch in branches(self.encoder).values() for path in branch.linears]
        for path in self.linears:
            layer = self.encoder.get_submodule(path)
            mask = MASKS[granularity](layer.get_parameter("weight"), method)
            parametrize.register_parametrization(layer, "weight", mask)
        require_reachable(self.masks, scope, density)
        if initial_scores is not None:
            self._start_from_(initial_scores)

    @property
    def masks(self) -> dict[str, Mask]:
        """By linear layer of the encoder, in forward order."""
        found = {path: self.encoder.get_submodule(path) for path in self.linears}
        return {path: layer.parametrizations.weight[0] for path, layer in found.items()}  # type: ignore[union-attr, index, misc]

    @property
    def stored(self) -> int:
        """How many weights of the linear layers a checkpoint holds with the masks as they are."""
        return sum(mask.stored(mask.kept) for mask in self.masks.values())

    @property
    def reached(self) -> float:
        """The density of the masks as they are."""
        return self.stored / sum(mask.weights for mask in self.masks.values())

    @torch.no_grad()
    def update_masks_(self, step: int, steps: int) -> None:
        """Chooses what stays at a step of the training by the weights and scores as they are now."""
        masks, remaining = self.masks, self.schedule.remaining(step, steps)
        if remaining == 1:
            chosen: dict[str, Tensor | None] = dict.fromkeys(masks)
        else:
            importance = {path: mask.importance(*originals(self.encoder, path)) for path, mask in masks.items()}
            chosen = dict(choose(masks, importance, self.scope, self.density, remaining))
        for path, mask in masks.items():
            mask.keep_(chosen[path])

    def parameter_groups(self, learning_rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
        """The groups of an optimizer. learning_rates: of the "scores", of the "sigma" (singular values) and of the "weights",
        which are all the rest. Decay is for weight matrices alone."""
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        special: dict[int, str] = {}
        for path, mask in self.masks.items():
            if mask.scores is not None:
                special[id(mask.scores)] = "scores"
            if self.granularity == "rank":
                special[id(originals(self.encoder, path)[1])] = "sigma"
        for parameter in self.parameters():
            if parameter.requires_grad:
                name = special.get(id(parameter), "weights")
                groups.setdefault((name, name == "weights" and parameter.dim() > 1), []).append(parameter)
        return [
            {"params": found, "lr": learning_rates[name], "weight_decay": weight_decay if decays else 0.0, "name": name}
            for (name, decays), found in groups.items()
        ]

    def settings(self) -> dict[str, Any]:
        """What tells this pruning from another, as JSON."""
        names = ("method", "granularity", "scope", "density")
        return {**{name: getattr(self, name) for name in names}, "schedule": self.schedule.to_json()}

    def _start_from_(self, scores: Mapping[str, Tensor]) -> None:
        if self.method != "movement":
            raise InputError(f"initial_scores: expected them with method 'movement', got {self.method!r}")
        for path, mask in self.masks.items():
            given = scores.get(path)
            if mask.scores is None or given is None or given.shape != mask.scores.shape:
                wanted = None if mask.scores is None else list(mask.scores.shape)
                got = None if given is None else list(given.shape)
                raise InputError(f"initial_scores: expected {path!r} of shape {wanted}, got {got}")
            mask.scores.data.copy_(given)


def originals(encoder: nn.Module, path: str) -> list[Tensor]:
    """What a parametrization keeps of a layer's weight: the weight, or the factors U, s and V."""
    held: Any = encoder.get_submodule(path).parametrizations.weight  # type: ignore[union-attr]
    return [held.original] if hasattr(held, "original") else [held.original0, held.original1, held.original2]


def attribution_scores(
    pruning: MultitaskPruning, batches: Iterable[Mapping[str, Any]], *, scale: float = 1.0
) -> dict[str, Tensor]:
    """Scores to start movement pruning from: attribution with a gate on each entry, as system A has one on each unit.

    For each batch, |dL/dc| of the gates c that multiply the entries (elements, or singular values) at c = 1: entry *
    dL/d(entry). Sums over batches (of one example each, they are absolute sums over examples) become ranks, spread evenly over
    [0, scale]: the least entry of all matrices has 0.
    batches: keyword arguments of the model's forward, with labels. The heads should know their tasks. The model, whose method
    must be movement, is left as it was. Raises InputError for another method, and where there are no batches.
    """
    masks = pruning.masks
    scores = {path: mask.scores for path, mask in masks.items() if mask.scores is not None}
    if not scores:
        raise InputError(f"pruning: expected one by movement, got {pruning.method!r}")
    sums = {path: torch.zeros_like(found, dtype=torch.float64) for path, found in scores.items()}
    count = 0
    with _dense(pruning):
        for batch in batches:
            count += 1
            loss = pruning(**batch).loss
            # Through an open mask, the straight-through gradient of a score is the derivative by the entry's gate.
            gradients = torch.autograd.grad(loss, list(scores.values()), allow_unused=True)
            for path, gradient in zip(scores, gradients, strict=True):
                if gradient is not None:
                    sums[path] += gradient.abs()
    if not count:
        raise InputError("batches: expected at least one, got none")
    return _ranked(sums, scale)


@torch.no_grad()
def magnitude_scores(pruning: MultitaskPruning, *, scale: float = 1.0) -> dict[str, Tensor]:
    """Scores to start movement pruning from: the entries' absolute values, as ranks like those of `attribution_scores`."""
    values = {path: mask.values(*originals(pruning.encoder, path)).abs().double() for path, mask in pruning.masks.items()}
    return _ranked(values, scale)


def _ranked(values: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Each value's rank among all, spread evenly over [0, scale]; of equal ones the first is the least."""
    every = torch.cat([found.flatten() for found in values.values()])
    ranks = torch.empty_like(every)
    ranks[every.argsort(stable=True)] = torch.linspace(0, scale, len(every), dtype=every.dtype, device=every.device)
    parts = torch.split(ranks, [found.numel() for found in values.values()])
    return {path: part.reshape(found.shape).float() for (path, found), part in zip(values.items(), parts, strict=True)}


@contextmanager
def _dense(pruning: MultitaskPruning) -> Iterator[None]:
    """The model in eval mode with all entries, and as it was afterwards."""
    masks = {mask: mask.mask for mask in pruning.masks.values()}
    training = {module: module.training for module in pruning.modules()}
    pruning.eval()
    try:
        for mask in masks:
            mask.keep_(None)
        yield
    finally:
        for mask, kept in masks.items():
            mask.keep_(kept)
        for module, mode in training.items():
            module.training = mode
