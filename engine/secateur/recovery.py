"""recover_: what pruning took from each branch's output, given back by refitting its out-projection; no training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from os.path import commonpath
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from secateur.data import Examples, read_examples
from secateur.errors import InputError
from secateur.families import branches
from secateur.gates import undisturbed
from secateur.integrated.replay import replaced
from secateur.modeling import GatherLinear
from secateur.site import Branch, Stack
from secateur.tasks import Batch, Task
from secateur.tasks.base import model_device

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
        wanted = _outputs(model, task, batches, [branch.output for branch in found])
        prefix = _Prefix(pruned, task, batches, found)
        for branch, layer in layers.items():
            fitted, held_out = _Moments(), _Moments()
            for k, batch in enumerate(batches):
                real = batch.real(target=branch.stack == "decoder" and has_encoder)
                held = _held_out(batch, real, len(rows))
                inputs, outputs = prefix.inputs(k, branch), wanted[branch.output][k]
                for moments, which in ((fitted, real & ~held), (held_out, real & held)):
                    moments.add(inputs[which], outputs[which])
            refits.append(_refit(branch.name, layer, fitted, held_out, method))
    return refits


def _layer(model: nn.Module, branch: Branch) -> nn.Linear:
    layer = model.get_submodule(branch.output)
    if type(layer) not in (nn.Linear, GatherLinear):
        raise InputError(f"pruned: expected a plain linear layer at {branch.output}, got {type(layer).__name__}")
    return cast(nn.Linear, layer)


def _held_out(batch: Batch, real: Tensor, examples: int) -> Tensor:
    """Every fifth example, or every fifth token where there are fewer examples: [B, T] or what expands to it."""
    if examples < _HELD_OUT:
        return torch.arange(real.shape[1], device=real.device).unsqueeze(0) % _HELD_OUT == _HELD_OUT - 1
    return torch.tensor(batch.rows, device=real.device).unsqueeze(1) % _HELD_OUT == _HELD_OUT - 1


def _outputs(model: nn.Module, task: Task, batches: Sequence[Batch], paths: Sequence[str]) -> dict[str, list[Tensor]]:
    """What the modules return for each batch."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    with ExitStack() as stack:
        for path, kept in found.items():
            handle = model.get_submodule(path).register_forward_hook(lambda m, a, output, kept=kept: kept.append(output))
            stack.callback(handle.remove)
        for batch in batches:
            task.logits(model, batch)
    return found


class _Reached(Exception):
    """The forward pass has come to where it is needed."""


class _Prefix:
    """Forward passes of batches up to a branch's out-projection. An encoder runs no more once its branches are done."""

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Batch], found: Sequence[Branch]) -> None:
        self._model, self._task, self._batches = model, task, batches
        self._encoder = _stack(found)
        self._states: dict[int, Any] = {}

    def inputs(self, k: int, branch: Branch) -> Tensor:
        """What the branch's out-projection reads in batch k: [B, T, channels]."""
        seen: list[Tensor] = []

        def reached(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            slots = module.slots if isinstance(module, GatherLinear) else None
            seen.append(arguments[0] if slots is None else arguments[0].index_select(-1, slots))
            raise _Reached

        handle = self._model.get_submodule(branch.output).register_forward_pre_hook(reached)
        try:
            with self._remembering(k, branch), suppress(_Reached):
                self._task.logits(self._model, self._batches[k])
        finally:
            handle.remove()
        return seen[0]

    @contextmanager
    def _remembering(self, k: int, branch: Branch) -> Iterator[None]:
        if self._encoder is None or branch.stack == "encoder":
            yield
        elif k in self._states:
            with replaced(self._model, {self._encoder: lambda *arguments, **options: self._states[k]}):
                yield
        else:
            encoder = self._model.get_submodule(self._encoder)
            handle = encoder.register_forward_hook(lambda module, arguments, output: self._states.__setitem__(k, output))
            try:
                yield
            finally:
                handle.remove()


def _stack(found: Sequence[Branch]) -> str | None:
    """The path of the encoder, where there is a decoder too: what all its linear layers have in common."""
    paths = {stack: [path for branch in found if branch.stack == stack for path in branch.linears] for stack in get_args(Stack)}
    if not paths["encoder"] or not paths["decoder"]:
        return None
    common = commonpath([path.replace(".", "/") for path in paths["encoder"]]).split("/")
    above = [".".join(common[:length]) for length in range(1, len(common) + 1)]
    return next(path for path in above if not any(other.startswith(f"{path}.") for other in paths["decoder"]))


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

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """sum |y - W h - b|^2."""
        inputs, crossed, h, y, size = self._sums
        found = (weight @ inputs * weight).sum() - 2 * (weight * crossed).sum() + size
        if bias is not None:
            found += self.tokens * bias.square().sum() + 2 * (bias * (weight @ h - y)).sum()
        return max(0.0, float(found))  # Rounding can leave less than nothing.

    def bias(self, weight: Tensor) -> Tensor:
        """The best bias for a weight: the mean of y - W h."""
        _, _, h, y, _ = self._sums
        return (y - weight @ h) / self.tokens

    def fits(self, weight: Tensor, ridges: Iterable[float], has_bias: bool) -> Iterator[Tensor]:
        """For each ridge the W that minimises sum |y - W h - b|^2 + ridge * |W - weight|^2, with the best b if there is one.

        By the eigenvalues of h's second moments, once for all ridges; directions without input stay as they are."""
        inputs, crossed, h, y, _ = self._sums
        if has_bias:
            inputs, crossed = inputs - torch.outer(h, h) / self.tokens, crossed - torch.outer(y, h) / self.tokens
        values, vectors = torch.linalg.eigh(inputs)
        values, missing = values.clamp(min=0), (crossed - weight @ inputs) @ vectors
        for ridge in ridges:
            held = ridge * max(float(values.mean()), torch.finfo(values.dtype).tiny)
            yield weight + (missing / (values + held)) @ vectors.T


def _refit(name: str, layer: nn.Linear, fitted: _Moments, held_out: _Moments, method: Method) -> Refit:
    """Gives a layer the weights and the bias that fit best, if they are better than its own."""
    whole = fitted.plus(held_out)
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    before, size = whole.error(weight, bias), max(whole.size, torch.finfo(torch.float64).tiny)
    ridge, found = None, weight
    if method == "least_squares" and weight.numel():
        tried = fitted.fits(weight, RIDGES, bias is not None)
        errors = [held_out.error(each, None if bias is None else fitted.bias(each)) for each in tried]
        _, ridge = min(zip(errors, RIDGES, strict=True), key=lambda pair: (pair[0], -pair[1]))
        (found,) = whole.fits(weight, [ridge], bias is not None)
    found = found.to(layer.weight.dtype)
    moved = None if bias is None else whole.bias(found.double()).to(layer.weight.dtype)
    after = whole.error(found.double(), None if moved is None else moved.double())
    if not after < before:
        return Refit(name, None, before / size, before / size)
    layer.weight.copy_(found)
    if moved is not None:
        layer.bias.copy_(moved)
    return Refit(name, ridge, before / size, after / size)
