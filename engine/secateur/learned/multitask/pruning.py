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
from secateur.model.ordinary import require_ordinary
from secateur.support.errors import InputError


class MultitaskPruning(MultitaskModel):
    """An encoder with masks on its linear layers and unpruned heads, to be trained by `secateur.learned.train`.

    The density is the share of the weights of the linear layers in the encoder's blocks, as a checkpoint stores them: a rank of
    an m x n matrix counts as m + n weights, a matrix as m * n at most. Biases, norms, embeddings and heads are neither pruned
    nor counted.

    Args:
        model: An encoder of a known family (BERT, T5 and their relatives), or a model that has one. It is copied and stays
            unchanged.
        tasks: The tasks by name. Every task gets a head of its own.
        method: The importance of an entry: "magnitude", its absolute value, or "movement", a trained score.
        granularity: "element" masks elements, W * M. "rank" masks the ranks of a singular value decomposition in float32,
            U (s * M) V.
        scope: "global" ranks the entries of all matrices together. "local" keeps the same share of every matrix.
        density: The final density, in (0, 1].
        schedule: How the density falls over training; by default `CubicSchedule()`.
        initial_scores: The initial scores of each linear layer, of the shape of its entries, instead of zeros. For "movement"
            only; see `attribution_scores`.
        pooling: What a head reads, "mean" or "first".
        dropout: The heads' dropout probability.
        seed: The seed of the heads' initial weights.

    Raises:
        InputError: A setting is unknown, the density cannot be reached (the message names the nearest), the initial scores do
            not fit, or as in `require_ordinary` and `MultitaskModel`.

    References:
        Xia and Shin 2021, arXiv 2112.05705.
        Sanh et al. 2020, arXiv 2005.07683, equation 4 (movement scores).

    Examples:
        >>> tasks = {"mood": secateur.learned.Classification(("bad", "good"))}
        >>> pruning = secateur.learned.MultitaskPruning(model, tasks, density=0.1)
        >>> features = secateur.learned.features_of(pruning, tokenizer, {"mood": examples}, max_length=128)
        >>> secateur.learned.train(pruning, features, arguments, tokenizer=tokenizer)
        >>> secateur.learned.save(secateur.learned.export(pruning), "out", tokenizer=tokenizer)
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
        require_ordinary(model)
        super().__init__(copy.deepcopy(encoder_of(model)), tasks, pooling=pooling, dropout=dropout, seed=seed)
        self.method, self.granularity, self.scope, self.density = method, granularity, scope, density
        self.schedule = schedule or CubicSchedule()
        # In forward order. They are listed before any weight is masked, as `branches` cannot read a masked weight.
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
        """The masks by linear layer of the encoder, in forward order."""
        layers = {path: self.encoder.get_submodule(path) for path in self.linears}
        return {path: layer.parametrizations.weight[0] for path, layer in layers.items()}  # type: ignore[union-attr, index, misc]

    @property
    def stored(self) -> int:
        """The number of the linear layers' weights that a checkpoint stores with the current masks."""
        return sum(mask.stored(mask.kept) for mask in self.masks.values())

    @property
    def reached(self) -> float:
        """The density of the current masks."""
        return self.stored / sum(mask.weights for mask in self.masks.values())

    @torch.no_grad()
    def update_masks_(self, step: int, steps: int) -> None:
        """Choose the masks of a training step from the current weights and scores.

        Args:
            step: The number of steps done.
            steps: The total number of steps.
        """
        masks, remaining = self.masks, self.schedule.remaining(step, steps)
        if remaining == 1:
            chosen: dict[str, Tensor | None] = dict.fromkeys(masks)
        else:
            importance = {path: mask.importance(*originals(self.encoder, path)) for path, mask in masks.items()}
            chosen = dict(choose(masks, importance, self.scope, self.density, remaining))
        for path, mask in masks.items():
            mask.keep_(chosen[path])

    def parameter_groups(self, learning_rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
        """Build the optimizer's parameter groups.

        Args:
            learning_rates: The learning rates of "scores", "sigma" (singular values) and "weights" (all other parameters).
            weight_decay: The decay of weight matrices. All other parameters have none.

        Returns:
            The groups that are not empty, each with "params", "lr", "weight_decay" and "name".
        """
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}  # by name, and whether the parameters decay
        name_of: dict[int, str] = {}
        for path, mask in self.masks.items():
            if mask.scores is not None:
                name_of[id(mask.scores)] = "scores"
            if self.granularity == "rank":
                name_of[id(originals(self.encoder, path)[1])] = "sigma"
        for parameter in self.parameters():
            if parameter.requires_grad:
                name = name_of.get(id(parameter), "weights")
                groups.setdefault((name, name == "weights" and parameter.dim() > 1), []).append(parameter)
        return [
            {"params": parameters, "lr": learning_rates[name], "weight_decay": weight_decay if decays else 0.0, "name": name}
            for (name, decays), parameters in groups.items()
        ]

    def settings(self) -> dict[str, Any]:
        """Return the settings of this pruning as JSON values by name."""
        names = ("method", "granularity", "scope", "density")
        return {**{name: getattr(self, name) for name in names}, "schedule": self.schedule.to_json()}

    def _start_from_(self, scores: Mapping[str, Tensor]) -> None:
        """Copy the initial scores; raise InputError if they do not fit."""
        if self.method != "movement":
            raise InputError(f"initial_scores: expected them with method 'movement', got {self.method!r}")
        for path, mask in self.masks.items():
            given = scores.get(path)
            if mask.scores is None or given is None or given.shape != mask.scores.shape:
                expected = None if mask.scores is None else list(mask.scores.shape)
                got = None if given is None else list(given.shape)
                raise InputError(f"initial_scores: expected {path!r} of shape {expected}, got {got}")
            mask.scores.data.copy_(given)


def originals(encoder: nn.Module, path: str) -> list[Tensor]:
    """Return the tensors that the parametrization of a layer's weight stores.

    Args:
        encoder: The masked encoder.
        path: The layer's path in the encoder.

    Returns:
        The weight [m, n] alone, or the factors U [m, ranks], s [ranks] and V [ranks, n].
    """
    stored: Any = encoder.get_submodule(path).parametrizations.weight  # type: ignore[union-attr]
    return [stored.original] if hasattr(stored, "original") else [stored.original0, stored.original1, stored.original2]


def attribution_scores(
    pruning: MultitaskPruning, batches: Iterable[Mapping[str, Any]], *, scale: float = 1.0
) -> dict[str, Tensor]:
    """Compute initial scores of movement pruning by attribution, with a gate on every entry instead of every unit.

    A batch adds |dL/dc| for the gates c that multiply the entries (elements or singular values), at c = 1. This derivative is
    entry * dL/d(entry). The sums over batches become ranks, spread evenly over [0, scale]: the least important entry of all
    matrices gets 0. With batches of one example, the sums are absolute sums over examples.

    Args:
        pruning: A pruning by movement, whose heads are trained on their tasks. It stays unchanged.
        batches: Keyword arguments of the model's forward pass, with labels, on the model's device.
        scale: The largest score.

    Returns:
        The initial scores of each linear layer, float32 of the shape of its entries.

    Raises:
        InputError: The method is not movement, or there are no batches.

    References:
        Yang et al. 2023, arXiv 2205.04157, equation 4 (gradient x activation attribution, there of units).
    """
    masks = pruning.masks
    scores = {path: mask.scores for path, mask in masks.items() if mask.scores is not None}
    if not scores:
        raise InputError(f"pruning: expected method 'movement', got {pruning.method!r}")
    sums = {path: torch.zeros_like(layer_scores, dtype=torch.float64) for path, layer_scores in scores.items()}
    count = 0
    with _dense(pruning):
        for batch in batches:
            count += 1
            loss = pruning(**batch).loss
            # With an open mask, the straight-through gradient of a score is the derivative by the entry's gate.
            gradients = torch.autograd.grad(loss, list(scores.values()), allow_unused=True)
            for path, gradient in zip(scores, gradients, strict=True):
                if gradient is not None:
                    sums[path] += gradient.abs()
    if not count:
        raise InputError("batches: expected at least one, got none")
    return _ranked(sums, scale)


@torch.no_grad()
def magnitude_scores(pruning: MultitaskPruning, *, scale: float = 1.0) -> dict[str, Tensor]:
    """Compute initial scores of movement pruning from the entries' absolute values.

    The values become ranks, spread evenly over [0, scale], as in `attribution_scores`.

    Args:
        pruning: The pruning, which stays unchanged.
        scale: The largest score.

    Returns:
        The initial scores of each linear layer, float32 of the shape of its entries.
    """
    values = {path: mask.values(*originals(pruning.encoder, path)).abs().double() for path, mask in pruning.masks.items()}
    return _ranked(values, scale)


def _ranked(values: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Replace the values by their ranks among all layers, spread evenly over [0, scale]; equal values rank by position."""
    flat = torch.cat([layer_values.flatten() for layer_values in values.values()])  # [entries of all layers]
    ranks = torch.empty_like(flat)
    ranks[flat.argsort(stable=True)] = torch.linspace(0, scale, len(flat), dtype=flat.dtype, device=flat.device)
    parts = torch.split(ranks, [layer_values.numel() for layer_values in values.values()])
    return {path: part.reshape(values[path].shape).float() for path, part in zip(values, parts, strict=True)}


@contextmanager
def _dense(pruning: MultitaskPruning) -> Iterator[None]:
    """Keep all entries and use eval mode inside the with statement; restore masks and modes after it."""
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
