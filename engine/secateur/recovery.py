"""recover_: what pruning took from each branch's output, given back by refitting its out-projection; no training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from secateur.data import Examples, read_examples
from secateur.errors import InputError
from secateur.families import branches
from secateur.gates import undisturbed
from secateur.modeling import GatherLinear
from secateur.site import Branch
from secateur.tasks import Batch, Task
from secateur.tasks.base import model_device
from secateur.walk import Walk

Method = Literal["bias", "least_squares"]
RIDGES = tuple(10.0**power for power in range(-9, 3))  # Of the mean eigenvalue of the inputs' second moments.
_HELD_OUT = 5  # Every fifth example.


@dataclass(frozen=True)
class Refit:
    """One branch's out-projection. before, after: the squared error of its output on the examples, relative to the dense
    output's sum of squares; ridge: how strongly the weights were held where they were, None where they were not refitted."""

    branch: str
    ridge: float | None
    before: float
    after: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recover_(
    pruned: nn.Module,
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    method: Method = "least_squares",
    unlabeled: bool = False,
    max_tokens: int = 4096,
) -> list[Refit]:
    """Refits the out-projections of a pruned model in place, so that each branch gives what it gives in the dense model.

    Branch after branch in the order of the forward pass, each with the inputs that the pruned and recovered layers below it
    give. "least_squares": the weights W that minimise sum |y - W h - b|^2 + ridge * |W - W_kept|^2 over the real tokens of the
    examples, y being the dense branch's output and h the pruned one's activations; the ridge is the one that is best on every
    fifth example, and the fit is then of all of them (as in He et al. 2017, arXiv 1707.06168, Eq. 3, for channels of
    convolutions). "bias": the mean of y - W_kept h is added to the bias. Biases are fitted where there are some; an
    architecture without (T5, Llama) gets none, and "bias" raises InputError there.
    No branch gets worse on the examples: where the fit would be, it is left as it is. Sums are float64.
    model: the dense one, untouched; its branches' outputs for all examples are held in memory. examples, max_tokens: as in
    `attribute`. unlabeled: examples need no targets and are run with all candidate labels.
    Raises InputError: unusable examples, a pruned model of another architecture, out-projections of other classes.
    """
    if method not in get_args(Method):
        raise InputError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    found = list(branches(pruned).values())
    layers = {branch: _layer(pruned, branch) for branch in found}
    if [branch.name for branch in found] != list(branches(model)):
        raise InputError("pruned: expected a model pruned from the dense one, got one with other branches")
    if method == "bias" and not any(layer.bias is not None for layer in layers.values()):
        raise InputError(f"method: expected least_squares for {type(pruned).__name__}, which has no biases to fit, got 'bias'")
    rows = read_examples(examples, task.columns[:1] if unlabeled else task.columns)
    items = task.items(model, rows, all_labels=unlabeled)
    batches = list(task.batches(items, model_device(model), max_tokens))
    has_encoder = any(branch.stack == "encoder" for branch in found)
    refits = []
    with undisturbed(model), undisturbed(pruned), torch.no_grad():
        dense, walk = Walk(model, task, batches), Walk(pruned, task, batches)
        for branch, layer in layers.items():
            fitted, held_out = _Moments(), _Moments()
            for k, batch in enumerate(batches):
                real = batch.real(target=branch.stack == "decoder" and has_encoder)
                held = _held_out(batch, real, len(rows))
                inputs, outputs = _read(layer, walk.reach(k, branch)[0]), dense.reach(k, branch)[1]
                for moments, which in ((fitted, real & ~held), (held_out, real & held)):
                    moments.add(inputs[which], outputs[which])
            refits.append(_refit(branch.name, layer, fitted, held_out, method))
    return refits


def _layer(model: nn.Module, branch: Branch) -> nn.Linear:
    layer = model.get_submodule(branch.output)
    if type(layer) not in (nn.Linear, GatherLinear):
        raise InputError(f"pruned: expected a plain linear layer at {branch.output}, got {type(layer).__name__}")
    return cast(nn.Linear, layer)


def _read(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """What the layer's weight is multiplied with."""
    return inputs.index_select(-1, layer.slots) if isinstance(layer, GatherLinear) else inputs


def _held_out(batch: Batch, real: Tensor, examples: int) -> Tensor:
    """Every fifth example, or every fifth token where there are fewer examples: [B, T] or what expands to it."""
    if examples < _HELD_OUT:
        return torch.arange(real.shape[1], device=real.device).unsqueeze(0) % _HELD_OUT == _HELD_OUT - 1
    return torch.tensor(batch.rows, device=real.device).unsqueeze(1) % _HELD_OUT == _HELD_OUT - 1


class _Moments:
    """Sums over tokens, float64: of inputs h [k] and wanted outputs y [d], of their products, and of |y|^2."""

    def __init__(self) -> None:
        self.tokens, self._sums = 0, list[Tensor]()

    def add(self, h: Tensor, y: Tensor) -> None:
        """h [n, k], y [n, d]."""
        h, y = h.double(), y.double()
        sums = [h.T @ h, y.T @ h, h.sum(0), y.sum(0), y.square().sum()]
        self._sums = [mine + other for mine, other in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.tokens += len(h)

    def plus(self, other: _Moments) -> _Moments:
        found = _Moments()
        found.tokens = self.tokens + other.tokens
        found._sums = [mine + theirs for mine, theirs in zip(self._sums, other._sums, strict=True)]
        return found

    @property
    def size(self) -> float:
        """sum |y|^2."""
        return float(self._sums[4])

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of h and of y."""
        return self._sums[2] / self.tokens, self._sums[3] / self.tokens

    def about(self, means: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """sum h h^T [k, k] and sum y h^T [d, k], of what h and y differ from the means by, if means are given."""
        inputs, crossed, h, y, _ = self._sums
        if means is None:
            return inputs, crossed
        of_h, of_y = means
        outer = torch.outer(of_h, h)
        inputs = inputs - outer - outer.T + self.tokens * torch.outer(of_h, of_h)
        crossed = crossed - torch.outer(of_y, h) - torch.outer(y, of_h) + self.tokens * torch.outer(of_y, of_h)
        return inputs, crossed

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """sum |y - W h - b|^2."""
        inputs, crossed, h, y, size = self._sums
        found = (weight @ inputs * weight).sum() - 2 * (weight * crossed).sum() + size
        if bias is not None:
            found += self.tokens * bias.square().sum() + 2 * (bias * (weight @ h - y)).sum()
        return max(0.0, float(found))  # Rounding can leave less than nothing.


def _refit(name: str, layer: nn.Linear, fitted: _Moments, held_out: _Moments, method: Method) -> Refit:
    """Gives a layer the weights and the bias that fit best, if they are better than its own."""
    whole = fitted.plus(held_out)
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    before, size = whole.error(weight, bias), max(whole.size, torch.finfo(torch.float64).tiny)
    ridge, found = None, weight
    if method == "least_squares" and weight.numel():
        # The best bias for a weight is what the means leave, so with a bias the weight is fitted to what differs from them.
        means = None if bias is None else fitted.means
        ridge = _ridge(weight, fitted.about(means), held_out.about(means))
    if ridge is not None:
        found = _fit(weight, *whole.about(None if bias is None else whole.means), ridge)
    found, moved = found.to(layer.weight.dtype), None
    if bias is not None:
        of_h, of_y = whole.means
        moved = (of_y - found.double() @ of_h).to(layer.weight.dtype)
    after = whole.error(found.double(), None if moved is None else moved.double())
    if not after < before:
        return Refit(name, None, before / size, before / size)
    layer.weight.copy_(found)
    if moved is not None:
        layer.bias.copy_(moved)
    return Refit(name, ridge, before / size, after / size)


def _ridge(weight: Tensor, fitted: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> float | None:
    """The ridge with which the fit to some tokens has the least error on others; None where none is better than the weight.

    In the basis of the inputs' second moments a ridge r turns what is missing, M, into the step M / (values + r), so all
    ridges' errors on the other tokens follow from one quadratic form in 1 / (values + r).
    """
    inputs, crossed = fitted
    values, vectors = torch.linalg.eigh(inputs)
    missing, wanted = (crossed - weight @ inputs) @ vectors, (held_out[1] - weight @ held_out[0]) @ vectors
    curvature = (missing.T @ missing) * (vectors.T @ held_out[0] @ vectors)
    slope = (missing * wanted).sum(0)
    best, least = None, 0.0
    for ridge in RIDGES:
        steps = 1 / (values.clamp(min=0) + ridge * _scale(inputs))
        error = float(steps @ curvature @ steps - 2 * (slope @ steps))
        if error < 0 and error <= least:
            best, least = ridge, error
    return best


def _fit(weight: Tensor, inputs: Tensor, crossed: Tensor, ridge: float) -> Tensor:
    """The W that minimises sum |y - W h|^2 + ridge * |W - weight|^2; directions without input stay as they are."""
    held = inputs + ridge * _scale(inputs) * torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
    step: Tensor = torch.linalg.solve(held, crossed - weight @ inputs, left=False)
    return weight + step


def _scale(inputs: Tensor) -> float:
    """The mean eigenvalue, which ridges are shares of."""
    return max(float(inputs.diagonal().mean()), torch.finfo(inputs.dtype).tiny)
