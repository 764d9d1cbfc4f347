"""Scores of whole layers without training: block influence, and attribution to gates on the layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attribution.integrated.quadrature import gauss
from secateur.attribution.pass_tokens import pass_tokens
from secateur.data.examples import Examples
from secateur.model.blocks import LayerUnit, blocks, gated, layers
from secateur.model.branches import Branch
from secateur.model.hooks import states_of
from secateur.model.undisturbed import undisturbed
from secateur.support.errors import InputError
from secateur.support.fields import shown
from secateur.support.progress import Progress, counted
from secateur.support.tensors import on_cpu
from secateur.tasks import Batch, Target, Task
from secateur.tasks.base import require_fit
from secateur.tasks.batches import model_device

LAYER_CRITERIA = ("influence", "gradient", "ig", "ig-joint")
Layers = Mapping[str, tuple[Branch, ...]]


@torch.inference_mode(False)  # Gradients are needed, also where the caller needs none.
def layer_scores(
    model: nn.Module,
    task: Task,
    examples: Examples,
    criterion: str = "influence",
    *,
    unit: LayerUnit = "block",
    target: Target = "log_probability",
    nodes: int = 16,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Score how much each layer is needed for a task.

    Give each layer a gate z that multiplies the layer's contribution to the residual stream. Afterwards the model is as it was
    before the call.

    Args:
        model: The model.
        task: The task.
        examples: The examples, or where to read them.
        criterion: How layers are scored: "influence" (`block_influence`), "gradient" (`layer_gate_gradients`), "ig"
            (`closing_effects`) or "ig-joint" (`joint_gradients`). All but "influence" score a layer by the mean over the
            examples of absolute values.
        unit: "block" for whole blocks, or "branch" for self-attention, cross-attention and FFN separately.
        target: The target F, whose change is attributed to the layers.
        nodes: The number of nodes of the quadrature rule of "ig-joint".
        max_tokens: The most padded input tokens in a batch. None means as in `attribute`.
        progress: As in `attribute`.

    Returns:
        The score of each layer by name, in the order of the forward pass. A higher score means that a layer is needed more.

    Raises:
        InputError: The criterion is unknown, the criterion is "influence" but the unit is "branch" (influence is defined for
            blocks), the examples are unusable, or a score is not finite.

    Example:
        >>> scores = secateur.layer_scores(model, task, examples, "influence")
        >>> names = secateur.choose_layers(scores, keep_layers=4)
        >>> shallow = secateur.delete_layers(model, names)

    Reference:
        Men et al. 2024, arXiv 2403.03853, Eq. 1, for "influence"; Sundararajan et al. 2017, arXiv 1703.01365, for "ig" and
        "ig-joint".
    """
    if criterion not in LAYER_CRITERIA:
        raise InputError(f"criterion: expected one of {', '.join(LAYER_CRITERIA)}, got {criterion!r}")
    if criterion == "influence" and unit != "block":
        raise InputError(f"unit: expected 'block' with criterion 'influence', got {unit!r}")
    if criterion == "influence" and target != "log_probability":
        raise InputError(f"target: expected none with criterion 'influence', which explains no target, got {target!r}")
    scored = layers(model, unit)
    require_fit(task, model)
    items = task.items(model, task.read(examples))

    def batches(run: Callable[[Batch], object]) -> Iterator[Batch]:
        tokens = pass_tokens(model, task, items, run) if max_tokens is None else max_tokens
        collated = task.batches(items, model_device(model), tokens)
        return counted(progress, "scoring examples", collated, len(items), lambda batch: len(batch.rows))

    if criterion == "influence":
        influence = block_influence(model, task, batches(lambda batch: block_influence(model, task, [batch])))
        _require_numbers(influence)
        return {name: influence[name] for name in scored}

    scorers: dict[str, Callable[[Batch], dict[str, Tensor]]] = {
        "gradient": lambda batch: layer_gate_gradients(model, task, scored, batch, target),
        "ig": lambda batch: closing_effects(model, task, scored, batch, target),
        "ig-joint": lambda batch: joint_gradients(model, task, scored, batch, target, nodes=nodes),
    }
    totals = dict.fromkeys(scored, 0.0)
    with undisturbed(model):
        for batch in batches(scorers["gradient"]):
            of_batch = scorers[criterion](batch)  # [B] by layer
            # One transfer for all layers, because each one waits for the device.
            sums = on_cpu([scores.double().abs().sum() for scores in of_batch.values()])
            of_layers = dict(zip(of_batch, torch.stack(sums).tolist(), strict=True))
            _require_numbers(of_layers)
            totals = {name: total + of_layers[name] for name, total in totals.items()}
    return {name: total / len(items) for name, total in totals.items()}


def choose_layers(scores: Mapping[str, float], keep_layers: int) -> list[str]:
    """Choose the layers to delete: those with the lowest scores, except that each stack keeps its best layer.

    Among equal scores, the earlier layer goes first.

    Args:
        scores: The scores of the layers by name, from `layer_scores`.
        keep_layers: The number of layers to keep.

    Returns:
        The names of the layers to delete, in the order of `scores`.

    Raises:
        InputError: The scores are no finite numbers by name, or the number leaves a stack without a layer, or exceeds the
            number of layers.

    Example:
        >>> choose_layers({"encoder.0": 0.1, "encoder.1": 0.2, "decoder.0": 5.0, "decoder.1": 3.0}, keep_layers=3)
        ['encoder.0']
    """
    _require_numbers(scores)
    stacks = {name.partition(".")[0] for name in scores}
    if isinstance(keep_layers, bool) or not isinstance(keep_layers, int) or not len(stacks) <= keep_layers <= len(scores):
        raise InputError(
            f"keep_layers: expected a number from {len(stacks)}, one for each stack, to the model's {len(scores)}, "
            f"got {keep_layers!r}"
        )
    best = {max((n for n in scores if n.partition(".")[0] == stack), key=scores.__getitem__) for stack in stacks}
    order = sorted((name for name in scores if name not in best), key=scores.__getitem__)
    deleted = set(order[: len(scores) - keep_layers])
    return [name for name in scores if name in deleted]


def _require_numbers(scores: Mapping[str, float]) -> None:
    """Raise InputError for scores that are no numbers by name, and for a score that is NaN or inf."""
    if not isinstance(scores, Mapping) or not all(isinstance(name, str) for name in scores):
        raise InputError(f"scores: expected numbers by the names of layers, got {shown(scores)}")
    for name, value in scores.items():
        try:
            finite = math.isfinite(value)
        except (TypeError, ValueError):
            raise InputError(f"scores: expected a number for {name!r}, got {shown(value)}") from None
        if not finite:
            raise InputError(f"model: the score of {name!r} is not finite (NaN or inf); is the dtype too narrow?")


def block_influence(model: nn.Module, task: Task, batches: Iterable[Batch]) -> dict[str, float]:
    """Compute the influence of each block: the mean over real tokens of 1 - cos(input, output) of its hidden states.

    Args:
        model: The model. Afterwards it is as it was before.
        task: The task.
        batches: The batches of examples.

    Returns:
        The influence by name of the block.

    Reference:
        Men et al. 2024, arXiv 2403.03853, Eq. 1.
    """
    by_name = blocks(model)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in by_name}  # Of 1 - cos, and of real tokens.
    of_batch: dict[str, Tensor] = {}

    def observe(name: str, real: Tensor, before: Tensor, after: Tensor) -> None:
        cosine = nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)  # [B, T]
        real = real.to(cosine.device)
        of_batch[name] = torch.stack([(1 - cosine).masked_fill(~real, 0).sum(), real.sum().double()])

    over_target = task.decodes_target and any(block.stack == "encoder" for block in by_name.values())
    with undisturbed(model), torch.no_grad():
        for batch in batches:
            # A decoder that has an encoder runs over the target of most tasks, everything else over the input.
            stacks = {block.stack for block in by_name.values()}
            real = {stack: batch.real(target=stack == "decoder" and over_target) for stack in stacks}  # [B, T]
            observers = {block.path: partial(observe, name, real[block.stack]) for name, block in by_name.items()}
            with _hidden_states(model, observers):
                task.logits(model, batch)
            for name, moved in zip(of_batch, on_cpu(list(of_batch.values())), strict=True):
                sums[name] += moved
            of_batch.clear()
    return {name: total / tokens for name, (total, tokens) in zip(sums, torch.stack([*sums.values()]).tolist(), strict=True)}


def layer_gate_gradients(
    model: nn.Module, task: Task, gated_layers: Layers, batch: Batch, target: Target, at: float = 1.0
) -> dict[str, Tensor]:
    """Compute dF/dz of each layer's gate, with all gates at the same value.

    At 1, this is gradient x activation of the layer's contribution to the residual stream.

    Args:
        model: The model. Its parameters must be frozen (`undisturbed`).
        task: The task.
        gated_layers: The branches of each layer by name.
        batch: The examples.
        target: The target F.
        at: The value of all gates.

    Returns:
        dF/dz of each example [B] by layer.
    """
    with torch.enable_grad():
        gates = {name: _gate(model, batch, at).requires_grad_(True) for name in gated_layers}
        with _gated(model, gated_layers, gates):
            value = task.target(model, batch, target)
        # In a model whose cross-attention was deleted, F does not depend on the encoder's gates.
        gradients = torch.autograd.grad(value.sum(), list(gates.values()), allow_unused=True)
    zeros = torch.zeros_like(value)
    return {name: zeros if gradient is None else gradient for name, gradient in zip(gates, gradients, strict=True)}


@torch.no_grad()
def closing_effects(model: nn.Module, task: Task, gated_layers: Layers, batch: Batch, target: Target) -> dict[str, Tensor]:
    """Compute integrated gradients of each layer's gate: the integral of dF/dz over z from 0 to 1, with all other gates at 1.

    By the fundamental theorem of calculus, the integral is F(1) - F(z = 0). So two forward passes give it exactly. A quadrature
    rule would need many passes, and a derivative at each node.

    Args:
        model: The model.
        task: The task.
        gated_layers: The branches of each layer by name.
        batch: The examples.
        target: The target F.

    Returns:
        The integral of each example [B] by layer.

    Reference:
        Sundararajan et al. 2017, arXiv 1703.01365 (completeness).
    """
    open_value = task.target(model, batch, target)
    effects = {}
    for name, branches_of_layer in gated_layers.items():
        with _gated(model, {name: branches_of_layer}, {name: _gate(model, batch, 0.0)}):
            effects[name] = open_value - task.target(model, batch, target)
    return effects


def joint_gradients(
    model: nn.Module, task: Task, gated_layers: Layers, batch: Batch, target: Target, *, nodes: int = 16
) -> dict[str, Tensor]:
    """Compute integrated gradients of the layers' gates along the path on which all gates go from 0 to 1 together.

    Their sum over the layers is F(1) - F(0), up to the error of the quadrature rule.

    Args:
        model: The model. Its parameters must be frozen (`undisturbed`).
        task: The task.
        gated_layers: The branches of each layer by name.
        batch: The examples.
        target: The target F.
        nodes: The number of nodes of the Gauss-Legendre rule.

    Returns:
        The integral of each example [B] by layer.

    Raises:
        InputError: `nodes` is not a positive number.

    Reference:
        Sundararajan et al. 2017, arXiv 1703.01365, Eq. 1.
    """
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise InputError(f"nodes: expected a positive number, got {nodes!r}")
    sums: dict[str, Tensor] = {}
    for at, weight in zip(*gauss(nodes), strict=True):
        for name, gradient in layer_gate_gradients(model, task, gated_layers, batch, target, float(at)).items():
            sums[name] = sums[name] + float(weight) * gradient if name in sums else float(weight) * gradient
    return sums


def _gate(model: nn.Module, batch: Batch, value: float) -> Tensor:
    """Return a gate of one value for each example [B], in float32 at least."""
    like = next(model.parameters())
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.full((len(batch.labels),), value, dtype=dtype, device=like.device)


def _gated(model: nn.Module, gated_layers: Layers, gates: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """A context in which each layer's gate [B] multiplies the outputs of its branches."""
    return gated(model, {branch: gates[name] for name, branches in gated_layers.items() for branch in branches})


@contextmanager
def _hidden_states(model: nn.Module, observers: Mapping[str, Callable[[Tensor, Tensor], None]]) -> Iterator[None]:
    """A context in which each module at a path passes its input and output [B, T, channels] to its observer."""

    def pass_on(
        observe: Callable[[Tensor, Tensor], None], module: nn.Module, arguments: tuple[Any, ...], keywords: Any, output: Any
    ) -> None:
        before = arguments[0] if arguments else keywords["hidden_states"]
        observe(before, states_of(output))

    handles = []
    try:
        for path, observe in observers.items():
            hook = partial(pass_on, observe)
            handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
