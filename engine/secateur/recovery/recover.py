"""recover_: what pruning took from each branch's output, given back by refitting its out-projection; no training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from secateur.data.examples import Examples, read_examples
from secateur.model.branches import Branch
from secateur.model.families import branches
from secateur.model.linear_layers import is_transposed, weight_of
from secateur.model.modeling import EmptyLinear, GatherLinear
from secateur.model.undisturbed import undisturbed
from secateur.pruning.prune import add_biases_
from secateur.recovery.least_squares import Moments, best_ridge, step
from secateur.recovery.walk import Walk
from secateur.support.errors import InputError
from secateur.tasks import Batch, Task
from secateur.tasks.batches import model_device

Method = Literal["least_squares", "scale", "bias"]
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
    model: nn.Module,
    pruned: nn.Module,
    task: Task,
    examples: Examples,
    *,
    method: Method = "least_squares",
    add_biases: bool = False,
    unlabeled: bool = False,
    max_tokens: int = 4096,
) -> list[Refit]:
    """Refits the out-projections of a pruned model in place, so that each branch gives what it gives in the dense model.

    Branch after branch in the order of the forward pass, each with the inputs that the pruned and recovered layers below it
    give. "least_squares": the weights W that minimise sum |y - W h - b|^2 + ridge * |W - W_kept|^2 over the real tokens of the
    examples, y being the dense branch's output and h the pruned one's activations; the ridge is the one that is best on every
    fifth example, and the fit is then of all of them (as in He et al. 2017, arXiv 1707.06168, Eq. 3, for channels of
    convolutions). "scale": the same of one number for each head, channel or neuron that multiplies W_kept's columns (the mask
    tuning of Kwon et al. 2022, arXiv 2204.09656, Section 3.3): far fewer numbers, so better where examples are few; after
    least squares it would change nothing. "bias": the mean of y - W_kept h is added to the bias. Biases are fitted with every
    method where there are some. An architecture without (T5, Llama) gets them if add_biases says so; the model is then no stock
    one. Otherwise "bias" raises InputError there.
    No branch gets worse on the examples: where the fit would be, it is left as it is. Sums are float64.
    model: the dense one, untouched. examples, max_tokens: as in `attribute`; both models' states before a branch are held in
    memory for all examples. unlabeled: examples need no targets and are run with all candidate labels.
    Raises InputError: unusable examples, a pruned model of another architecture, out-projections of other classes.
    """
    if method not in get_args(Method):
        raise InputError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    found = list(branches(pruned).values())
    if [branch.name for branch in found] != list(branches(model)):
        raise InputError("pruned: expected a model pruned from the dense one, got one with other branches")
    _require_order(model, pruned)
    layers = {branch: _layer(pruned, branch) for branch in found}
    if method == "bias" and not add_biases and all(layer.bias is None for layer in layers.values()):
        raise InputError(f"method: expected least_squares for {type(pruned).__name__}, which has no biases to fit, got 'bias'")
    rows = read_examples(examples, task.columns_for(all_labels=unlabeled))
    items = task.items(model, rows, all_labels=unlabeled)
    batches = list(task.batches(items, model_device(model), max_tokens))
    if add_biases:
        add_biases_(pruned, [branch.output for branch, layer in layers.items() if layer.bias is None])
        layers = {branch: _layer(pruned, branch) for branch in found}
    has_encoder = any(branch.stack == "encoder" for branch in found)
    refits = []
    with undisturbed(model), undisturbed(pruned), torch.no_grad():
        dense, walk = Walk(model, task, batches), Walk(pruned, task, batches)
        for branch, layer in layers.items():
            fitted, held_out = Moments(), Moments()
            for k, batch in enumerate(batches):
                real = batch.real(target=branch.stack == "decoder" and has_encoder)
                held = _held_out(batch, real, len(rows))
                inputs, outputs = _read(layer, walk.reach(k, branch)[0]), dense.reach(k, branch)[1]
                for moments, which in ((fitted, real & ~held), (held_out, real & held)):
                    moments.add(inputs[which], outputs[which])
            refits.append(_refit(branch.name, layer, _units(branch, layer), fitted, held_out, method))
    return refits


def _require_order(model: nn.Module, pruned: nn.Module) -> None:
    """Raises InputError where the second model has a wider branch than the first: the first is the one that was pruned."""
    dense = branches(model)
    for name, branch in branches(pruned).items():
        if branch.output_width > dense[name].output_width:
            raise InputError(
                f"pruned: expected the dense model first and the pruned one second, got a pruned model whose {name} is wider "
                f"than the dense model's ({branch.output_width} channels and {dense[name].output_width})"
            )


def _units(branch: Branch, layer: nn.Linear) -> Tensor:
    """Which unit each input of the out-projection belongs to: a head, where heads are whole, or a channel or neuron."""
    inputs = torch.arange(weight_of(layer).shape[1], device=layer.weight.device)
    return inputs // branch.channels_of_unit(len(inputs))


def _layer(model: nn.Module, branch: Branch) -> nn.Linear:
    layer = model.get_submodule(branch.output)
    if type(layer) not in (nn.Linear, GatherLinear, EmptyLinear) and not is_transposed(layer):
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


def _refit(name: str, layer: nn.Linear, units: Tensor, fitted: Moments, held_out: Moments, method: Method) -> Refit:
    """Gives a layer the weights and the bias that fit best, if they are better than its own. units [k]: which unit each input
    belongs to."""
    whole = fitted.plus(held_out)
    weight, bias = weight_of(layer).double(), None if layer.bias is None else layer.bias.double()
    before, size = whole.error(weight, bias), max(whole.size, torch.finfo(torch.float64).tiny)
    ridge, found = None, weight
    if method != "bias" and weight.numel():
        # The best bias for a weight is what the means leave, so with a bias the weight is fitted to what differs from them.
        means, of_whole = (None, None) if bias is None else (fitted.means, whole.means)
        equations = partial(_for_weights if method == "least_squares" else _for_scales, weight, units)
        ridge = best_ridge(equations(*fitted.about(means)), equations(*held_out.about(means)))
        if ridge is not None:
            moved = step(*equations(*whole.about(of_whole)), ridge)
            found = weight + moved if method == "least_squares" else weight * (1 + moved[0, units])
    found, shifted = found.to(layer.weight.dtype), None
    if bias is not None:
        of_inputs, of_outputs = whole.means
        shifted = (of_outputs - found.double() @ of_inputs).to(layer.weight.dtype)
    after = whole.error(found.double(), None if shifted is None else shifted.double())
    if not after < before:
        return Refit(name, None, before / size, before / size)
    weight_of(layer).copy_(found)
    if shifted is not None:
        layer.bias.copy_(shifted)
    return Refit(name, ridge, before / size, after / size)


def _for_weights(weight: Tensor, units: Tensor, inputs: Tensor, crossed: Tensor) -> tuple[Tensor, Tensor]:
    """Normal equations of a step from the weight: one for each output, all with the same matrix."""
    return inputs, crossed - weight @ inputs


def _for_scales(weight: Tensor, units: Tensor, inputs: Tensor, crossed: Tensor) -> tuple[Tensor, Tensor]:
    """Normal equations of a step from scale 1, of one number for each unit."""
    matrix = (weight.T @ weight) * inputs
    missing = (weight * crossed).sum(0) - matrix.sum(1)
    count = int(units.max()) + 1

    def fold(rows: Tensor) -> Tensor:
        """[n, k] to [n, units]: the sum over each unit's inputs."""
        return rows.new_zeros(len(rows), count).index_add_(1, units, rows)

    return fold(fold(matrix).T), fold(missing.unsqueeze(0))
