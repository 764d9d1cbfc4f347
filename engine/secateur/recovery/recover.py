"""recover_: refit linear layers, so that the residual stream is near the dense model's again, without training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from secateur.data.examples import Examples
from secateur.model.branches import Branch, FeedForward
from secateur.model.families import branches
from secateur.model.linear_layers import is_kind, is_transposed, weight_of
from secateur.model.modeling import EmptyLinear, GatherLinear
from secateur.model.offloading import require_values
from secateur.model.ordinary import require_ordinary
from secateur.model.undisturbed import undisturbed
from secateur.pruning.prune import add_biases_
from secateur.recovery.least_squares import (
    SMALL,
    Equations,
    Moments,
    best_ridge,
    changes_of,
    double,
    in_their_span,
    mixture_of,
    step,
)
from secateur.recovery.matching import branches_of_dense, require_order
from secateur.recovery.targets import Targets, targets_of
from secateur.recovery.walk import Walk
from secateur.support.errors import InputError
from secateur.support.progress import Progress, counted
from secateur.tasks import Batch, Task

Method = Literal["least_squares", "scale", "bias"]
_FIFTH = 5  # Every fifth example is held out.
# With fewer examples a single fifth is too few to choose by, so each fifth is held out in turn. It takes five times as long.
_FEW = 50
_MIXED = 64  # Mixtures of the outputs that stand for all outputs in the search for the ridge, where there are many.
_MANY = 256
_DOUBT = 4  # Standard errors of the mixtures' sum, within which all outputs decide whether a refit is better.


@dataclass(frozen=True)
class Refit:
    """The refit of one branch.

    Attributes:
        branch: The name of the branch in the dense model.
        ridge: The ridge that held the out-projection's weights near their values, or None where they were not refitted.
        before: The squared error of the output on the examples before the refit, relative to the sum of squares of the outputs
            that bring back the dense stream.
        after: The same error after the refit.
        ridge_of_inputs: The ridge that held the correction of what in-projections read near none, or None where there is none.
    """

    branch: str
    ridge: float | None
    before: float
    after: float
    ridge_of_inputs: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def recover_(
    model: nn.Module,
    pruned: nn.Module,
    task: Task,
    examples: Examples,
    *,
    method: Method = "least_squares",
    add_biases: bool = False,
    unlabeled: bool = False,
    removed_blocks: Collection[str] = (),
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[Refit]:
    """Refit a pruned model's linear layers in place, so that the residual stream is what it is in the dense model.

    Branches are refitted in the order of the forward pass. Each sees the inputs that the pruned and recovered layers before it
    give, and also gives back what those layers and removed blocks have lost. A layer whose refit is no better on held-out
    examples stays as it is. Sums and fits are float64. The states before a branch are held in memory for all examples.
    The dense model's streams behind all branches are held too, in files where they take more than 2 GiB (`Targets`). Biases
    are fitted with every method where the layers have some.

    Args:
        model: The dense model. It stays unchanged.
        pruned: The model pruned from it.
        task: The task of the examples.
        examples: The examples, as in `attribute`.
        method: "least_squares" finds the weights W that minimise sum |y - W h - b|^2 + ridge * |W - W_kept|^2 over the real
            tokens of the examples, where y is the dense stream behind the branch minus the pruned stream in front of it, and h
            the pruned branch's activations. Where a norm follows the out-projection (Gemma), y is its dense output. The ridge
            is the best one on every fifth example, which is held out from the fit; with fewer than 50 examples each fifth is
            held out in turn. The final fit is to all examples. Before that, the in-projections of a feed-forward are
            multiplied by the matrix I + E that brings what they read nearest to what they read in the dense model, in the same
            way. "scale" finds one factor for each head, channel or neuron, which multiplies W_kept's columns, in the same way.
            Its numbers are far fewer, so it is better with few examples; after least squares it would change nothing. "bias"
            adds the mean of y - W_kept h to the bias.
        add_biases: Whether an architecture without biases (T5, Llama) gets some. The model is then no stock one. Without them
            "bias" raises InputError there.
        unlabeled: Whether the examples need no targets. They run with all candidate labels.
        removed_blocks: The blocks of `model` that `pruned` lacks, by their names in `model`: `plan.removed_blocks`.
        max_tokens: As in `attribute`.
        progress: True for a progress bar, or a function of (branches refitted, all branches).

    Returns:
        The refit of each branch.

    Raises:
        InputError: The examples are unusable, or too many for the space for files; the pruned model is of another architecture,
            or is the dense one; the out-projections have other classes; or `require_ordinary` refuses one of the models.

    Reference:
        Least squares: He et al. 2017 (arXiv 1707.06168), Eq. 3, for channels of convolutions, and its case of residual
        branches for y. Scale: the mask tuning of Kwon et
        al. 2022 (arXiv 2204.09656), Section 3.3.
    """
    _require_known([method])
    for name, checked in (("model", model), ("pruned", pruned)):
        require_ordinary(checked)
        require_values(checked, name)
    of_dense = branches_of_dense(model, pruned, removed_blocks)
    layers = {branch: _layer(pruned, branch) for branch in of_dense}
    if not add_biases:
        require_methods(pruned, [method])
    require_order(model, pruned, of_dense)
    targets = targets_of(model, task, examples, unlabeled=unlabeled, max_tokens=max_tokens)
    if add_biases:
        add_biases_(pruned, [branch.output for branch, layer in layers.items() if layer.bias is None])
    return refit_(targets, pruned, method, removed_blocks, progress)


def refit_(
    targets: Targets, pruned: nn.Module, method: Method, removed_blocks: Collection[str] = (), progress: Progress | None = None
) -> list[Refit]:
    """Refit as `recover_` does, towards targets that several pruned models may share. The models are checked already.

    Args:
        targets: The targets.
        pruned: The pruned model.
        method: As in `recover_`.
        removed_blocks: As in `recover_`.
        progress: As in `recover_`.

    Returns:
        The refit of each branch.

    Raises:
        InputError: As in `recover_`.
    """
    of_dense = branches_of_dense(targets.model, pruned, removed_blocks)
    layers = {branch: _layer(pruned, branch) for branch in of_dense}
    over_target = targets.task.decodes_target and any(branch.stack == "encoder" for branch in of_dense)
    refits = []
    with undisturbed(targets.model), undisturbed(pruned), torch.no_grad():
        targets.start()
        walk = Walk(pruned, targets.task, targets.batches)
        for branch, layer in counted(progress, "recovering", layers.items(), len(layers)):
            reals = [batch.real(target=branch.stack == "decoder" and over_target) for batch in targets.batches]
            dense, of_inputs = of_dense[branch], None
            if method == "least_squares" and isinstance(branch, FeedForward) and not branch.empty:
                of_inputs = _correct_inputs(walk, targets, reals, branch, cast(FeedForward, dense))
            tokens = _tokens(walk, targets, reals, branch, dense)
            parts, basis = _sums(tokens, targets, reals, weight_of(layer).shape[1], method)
            refit = _refit(dense.name, layer, _units(branch, layer), parts, method, basis)
            refits.append(replace(refit, ridge_of_inputs=of_inputs))
    return refits


def _correct_inputs(
    walk: Walk, targets: Targets, reals: Sequence[Tensor], branch: FeedForward, dense: FeedForward
) -> float | None:
    """Multiply the in-projections of a branch by what brings their inputs nearest to the dense model's. Returns the ridge.

    Args:
        walk: The walk of the pruned model.
        targets: The targets.
        reals: As in `_tokens`.
        branch: The branch in the pruned model.
        dense: The branch in the dense model.
    """
    layers = [cast(nn.Linear, walk.model.get_submodule(path)) for path in branch.inputs]
    channels = weight_of(layers[0]).shape[1]

    def tokens() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for k, (batch, real) in enumerate(zip(targets.batches, reals, strict=True)):
            reads = walk.enter(k, branch)
            wanted = targets.entering(k, dense).to(reads.device)
            part_of = _parts(batch, real, targets.examples).expand_as(real)
            of_real = [states.view(*real.shape, channels)[real] for states in (reads, wanted)]
            yield of_real[0], of_real[1], part_of[real]

    parts, basis = _sums(tokens(), targets, reals, channels, "least_squares")
    with_bias = all(layer.bias is not None for layer in layers)
    # In bfloat16 a small correction beside 1 would be lost.
    wide, device = torch.promote_types(layers[0].weight.dtype, torch.float32), layers[0].weight.device
    correction = nn.Linear(channels, channels, bias=with_bias, device=device, dtype=wide)
    nn.init.eye_(correction.weight)
    if with_bias:
        nn.init.zeros_(correction.bias)
    refit = _refit(dense.name, correction, torch.arange(channels), parts, "least_squares", basis)
    for layer in layers:
        weight = weight_of(layer).to(wide)
        if with_bias:
            layer.bias.copy_(layer.bias.to(wide) + weight @ correction.bias)
        weight_of(layer).copy_(weight @ correction.weight)
    return refit.ridge


def _sums(
    tokens: Iterator[tuple[Tensor, Tensor, Tensor]], targets: Targets, reals: Sequence[Tensor], inputs: int, method: Method
) -> tuple[list[Moments], Tensor | None]:
    """Return the moments of each part of the tokens, and the basis of their inputs where few tokens have one.

    Args:
        tokens: Inputs [n, inputs], outputs [n, d] and parts [n] of each batch, as `_tokens` gives them.
        targets: The targets.
        reals: As in `_tokens`.
        inputs: The number of inputs.
        method: As in `recover_`.
    """
    parts = [Moments() for _ in range(_count(targets.examples))]  # The last one is always held out.
    basis: Tensor | None = None
    # With more tokens the basis costs more than it saves.
    if 3 * sum(int(real.sum()) for real in reals) <= 2 * inputs and method == "least_squares":
        h, y, part_of = (torch.cat(several) for several in zip(*tokens, strict=True))
        basis, h = in_their_span(h)
        tokens = iter([(h, y.to(h.device), part_of.to(h.device))])
    for h, y, part_of in tokens:
        for number, moments in enumerate(parts):
            moments.add(h[part_of == number], y[part_of == number])
    return parts, basis


def require_methods(model: nn.Module, methods: Collection[Method | None]) -> None:
    """Raise InputError for an unknown method, or for "bias" and a model, dense or pruned, without biases in out-projections."""
    _require_known(methods)
    if "bias" in methods and all(_layer(model, branch).bias is None for branch in branches(model).values()):
        raise InputError(f"method: expected least_squares for {type(model).__name__}, which has no biases to fit, got 'bias'")


def _require_known(methods: Collection[Method | None]) -> None:
    """Raise InputError for an unknown method."""
    for method in methods:
        if method not in (None, *get_args(Method)):
            raise InputError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")


def _units(branch: Branch, layer: nn.Linear) -> Tensor:
    """Return the unit of each input of the out-projection [inputs]: a head where heads are whole, or a channel or neuron."""
    inputs = torch.arange(weight_of(layer).shape[1], device=layer.weight.device)
    return inputs // branch.channels_of_unit(len(inputs))


def _layer(model: nn.Module, branch: Branch) -> nn.Linear:
    """Return the out-projection of a branch. Raises InputError for a class that cannot be refitted."""
    layer = model.get_submodule(branch.output)
    special = any(is_kind(layer, kind) for kind in (GatherLinear, EmptyLinear))
    if type(layer) is not nn.Linear and not special and not is_transposed(layer):
        raise InputError(f"pruned: expected a plain linear layer at {branch.output}, got {type(layer).__name__}")
    return cast(nn.Linear, layer)


def _read(layer: Any, inputs: Tensor) -> Tensor:
    """Return the inputs [B, T, k] that the layer's weight multiplies."""
    return inputs.index_select(-1, layer.slots) if is_kind(layer, GatherLinear) else inputs


def _count(examples: int) -> int:
    """Return the number of parts of the data."""
    return _FIFTH if examples < _FEW else 2


def _parts(batch: Batch, real: Tensor, examples: int) -> Tensor:
    """Return which part of the data the tokens are in, as numbers [B, 1] or [1, T] that go with the real tokens [B, T].

    Five parts are the fifths of the examples, or of the tokens if there are fewer examples; two are the first four fifths, and
    the last one.
    """
    if examples < _FIFTH:
        fifths = torch.arange(real.shape[1], device=real.device).unsqueeze(0) % _FIFTH
    else:
        fifths = torch.tensor(batch.rows, device=real.device).unsqueeze(1) % _FIFTH
    return fifths if _count(examples) == _FIFTH else (fifths == _FIFTH - 1).long()


def _tokens(
    walk: Walk, targets: Targets, reals: Sequence[Tensor], branch: Branch, dense: Branch
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each batch its real tokens' inputs [n, k] of the out-projection, its target outputs [n, d] and parts [n].

    Args:
        walk: The walk of the pruned model.
        targets: The targets.
        reals: [B, T] for each batch, which tokens are real.
        branch: The branch in the pruned model.
        dense: The branch in the dense model.
    """
    layer = _layer(walk.model, branch)
    for k, (batch, real) in enumerate(zip(targets.batches, reals, strict=True)):
        reached = walk.reach(k, branch)
        outputs = targets.behind(k, dense).to(reached.outputs.device)
        if reached.stream is not None:
            outputs = outputs - reached.stream
        part_of = _parts(batch, real, targets.examples).expand_as(real)
        yield _read(layer, reached.inputs)[real], outputs[real], part_of[real]


@dataclass(frozen=True)
class _Folds:
    """The equations of the fitted and the held-out tokens of each fold, made anew in each iteration to save memory.

    Attributes:
        parts: The moments of the parts of the data.
        equations: From sum h h^T and sum y h^T to the equations of the step.
        centred: Whether differences from the fitted means are fitted, since the best bias follows from the means.
    """

    parts: Sequence[Moments]
    equations: Callable[[Tensor, Tensor], Equations]
    centred: bool

    def __iter__(self) -> Iterator[tuple[Equations, Equations]]:
        for fitted, held_out in _folds(self.parts):
            means = fitted.means if self.centred else None
            yield self.equations(*fitted.about(means)), self.equations(*held_out.about(means))


def _best_ridge(
    parts: Sequence[Moments],
    weight: Tensor,
    bias: Tensor | None,
    equations: Callable[[Tensor, Tensor], Equations],
    width: int | None,
    change: float,
    mix: bool,
) -> tuple[float | None, float]:
    """Return the best ridge and the change of the error on held-out tokens by its steps, or None and 0.

    Args:
        parts: The moments of the parts of the data.
        weight: The weight [d, k] that the steps begin at.
        bias: Its bias [d].
        equations: As in `_Folds`.
        width: As in `step`.
        change: The change of that error that comes from elsewhere.
        mix: Whether mixtures may stand for the outputs. All outputs decide where a negative sum of both changes is in doubt.
    """

    def folds(mixture: Tensor | None) -> _Folds:
        if mixture is None:
            return _Folds([part.without(weight, bias) for part in parts], equations, bias is not None)
        of_weight, of_bias = mixture @ weight, None if bias is None else mixture @ bias
        return _Folds([part.mixed(mixture).without(of_weight, of_bias) for part in parts], equations, bias is not None)

    ridge, changes = best_ridge(folds(mixture_of(len(weight), _MIXED).to(weight) if mix else None), width)
    doubt = _DOUBT * float(changes.std()) * len(changes) ** 0.5 if mix else 0.0
    if ridge is not None and change + float(changes.sum()) + doubt >= 0 and mix:
        (changes,) = changes_of(folds(None), [ridge], width, narrow=False)
    of_steps = float(changes.sum())
    return (None, 0.0) if ridge is None or of_steps >= 0 else (ridge, of_steps)


def _change_by_bias(weight: Tensor, bias: Tensor, fitted: Moments, held_out: Moments) -> float:
    """Return the change of the error on held-out tokens by the bias that fits best beside a weight [d, k]."""
    best, missing = (of.means[1] - weight @ of.means[0] - bias for of in (fitted, held_out))  # [d] each
    return float(held_out.tokens * (best @ (best - 2 * missing)))


def _folds(parts: Sequence[Moments]) -> Iterator[tuple[Moments, Moments]]:
    """Yield pairs of fitted and held-out tokens. Of two parts the second is held out, of more each one in turn."""
    for part in parts[1:] if len(parts) == 2 else parts:
        fitted = reduce(Moments.plus, [other for other in parts if other is not part])
        if fitted.tokens and part.tokens:
            yield fitted, part


def _refit(name: str, layer: nn.Linear, units: Tensor, parts: Sequence[Moments], method: Method, basis: Tensor | None) -> Refit:
    """Give a layer the weights and the bias that fit best, if they are better than its own on held-out tokens.

    Args:
        name: The name of the branch.
        layer: The out-projection.
        units: [k], the unit that each input belongs to.
        parts: The moments of the parts of the data, which `_folds` holds out.
        method: As in `recover_`.
        basis: [k, n], where the moments are of coordinates of the inputs in this basis; None where they are of the inputs.
    """
    weight, bias = double(weight_of(layer)), None if layer.bias is None else double(layer.bias)
    units = units.to(weight.device)  # Of the sums, which may be another than the layer's.
    size = max(sum(part.size for part in parts), torch.finfo(torch.float64).tiny)
    seen = weight if basis is None else weight @ basis
    whole = reduce(Moments.plus, parts).without(seen, bias)  # What is missing.
    if not all(bool(torch.isfinite(mean).all()) for mean in whole.means):
        raise InputError(f"model: activations of {name!r} are not finite (NaN or inf); is the dtype too narrow?")
    ridge, new_weight, change = None, weight, 0.0  # The change of the error on held-out tokens.
    if bias is not None:
        change = sum(_change_by_bias(seen, bias, *fold) for fold in _folds(parts))
    if method != "bias" and weight.numel():
        equations = _for_weights if method == "least_squares" else partial(_for_scales, weight, units)
        width = None if basis is None else len(basis)
        mix = method == "least_squares" and len(weight) > _MANY and seen.shape[1] >= SMALL
        ridge, of_step = _best_ridge(parts, seen, bias, equations, width, change, mix)
        change += of_step
        if ridge is not None:
            moved = step(*equations(*whole.about(None if bias is None else whole.means)), ridge, width)
            if method == "least_squares":
                new_weight = weight + (moved if basis is None else moved @ basis.T)
            else:
                new_weight = weight * (1 + moved[0, units])
    new_weight = new_weight.to(layer.weight.dtype)
    taken = double(new_weight) - weight if basis is None else (double(new_weight) - weight) @ basis
    new_bias, taken_by_bias = None, None
    if bias is not None:
        of_inputs, of_outputs = whole.means
        new_bias = (bias + of_outputs - taken @ of_inputs).to(layer.weight.dtype)
        taken_by_bias = double(new_bias) - bias
    after = whole.error(taken, taken_by_bias)
    if not (change < 0 and after < whole.size):
        return Refit(name, None, whole.size / size, whole.size / size)
    weight_of(layer).copy_(new_weight)
    if new_bias is not None:
        layer.bias.copy_(new_bias)
    return Refit(name, ridge, whole.size / size, after / size)


def _for_weights(inputs: Tensor, missing: Tensor) -> Equations:
    """Return the normal equations of a step from the weight, one for each output, all with the same matrix [k, k]."""
    return inputs, missing


def _for_scales(weight: Tensor, units: Tensor, inputs: Tensor, missing: Tensor) -> Equations:
    """Return the normal equations of a step from scale 1, with one number for each unit."""
    matrix = (weight.T @ weight) * inputs  # [k, k]
    count = int(units.max()) + 1

    def fold(rows: Tensor) -> Tensor:
        """Return the sums over each unit's inputs, from [n, k] to [n, units]."""
        return rows.new_zeros(len(rows), count).index_add_(1, units, rows)

    return fold(fold(matrix).T), fold((weight * missing).sum(0, keepdim=True))
