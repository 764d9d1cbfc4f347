"""Scores of whole layers without training: block influence, and attribution to a gate on what each layer adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attribution.integrated.quadrature import gauss
from secateur.data.examples import Examples, read_examples
from secateur.model.blocks import LayerUnit, blocks, gated, layers
from secateur.model.branches import Branch
from secateur.model.undisturbed import undisturbed
from secateur.support.errors import InputError
from secateur.tasks import Batch, Target, Task
from secateur.tasks.batches import model_device

LAYER_CRITERIA = ("influence", "gradient", "ig", "ig-joint")
Layers = Mapping[str, tuple[Branch, ...]]
Progress = Callable[[Iterable[Batch], int], Iterable[Batch]]


def layer_scores(
    model: nn.Module,
    task: Task,
    examples: Examples,
    criterion: str = "influence",
    *,
    unit: LayerUnit = "block",
    target: Target = "log_probability",
    nodes: int = 16,
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> dict[str, float]:
    """How much each layer is needed, by name, in the order of the forward pass. The model is left as it was.

    criterion: "influence" (`block_influence`), "gradient" (`layer_gate_gradients`), "ig" (`closing_effects`), "ig-joint"
    (`joint_gradients`); but for the first, the mean over the examples of absolute values. target: F, which is attributed.
    unit: "block", or "branch" for self-attention, cross-attention and FFN apart. nodes: of the rule of "ig-joint". progress: as
    in `attribute`.
    Raises InputError: an unknown criterion; influence of branches, which is defined for blocks; unusable examples.
    """
    if criterion not in LAYER_CRITERIA:
        raise InputError(f"criterion: expected one of {', '.join(LAYER_CRITERIA)}, got {criterion!r}")
    if criterion == "influence" and unit != "block":
        raise InputError(f"unit: expected 'block' with criterion 'influence', got {unit!r}")
    chosen = layers(model, unit)
    items = task.items(model, read_examples(examples, task.columns))
    batches: Iterable[Batch] = task.batches(items, model_device(model), max_tokens)
    batches = progress(batches, len(items)) if progress else batches
    if criterion == "influence":
        influence = block_influence(model, task, batches)
        return {name: influence[name] for name in chosen}

    found: dict[str, Callable[[Batch], dict[str, Tensor]]] = {
        "gradient": lambda batch: layer_gate_gradients(model, task, chosen, batch, target),
        "ig": lambda batch: closing_effects(model, task, chosen, batch, target),
        "ig-joint": lambda batch: joint_gradients(model, task, chosen, batch, target, nodes=nodes),
    }
    totals = dict.fromkeys(chosen, 0.0)
    with undisturbed(model):
        for batch in batches:
            for name, scores in found[criterion](batch).items():
                if not bool(torch.isfinite(scores).all()):
                    raise InputError(f"model: the score of {name!r} is not finite (NaN or inf); is the dtype too narrow?")
                totals[name] += float(scores.double().abs().sum())
    return {name: total / len(items) for name, total in totals.items()}


def choose_layers(scores: Mapping[str, float], keep_layers: int) -> list[str]:
    """The names that go when keep_layers of them stay: those of the lowest scores, the earlier first among equals. The best one
    of each stack stays.

    Raises InputError: a number that leaves a stack none, or more layers than there are.
    """
    stacks = {name.partition(".")[0] for name in scores}
    if isinstance(keep_layers, bool) or not isinstance(keep_layers, int) or not len(stacks) <= keep_layers <= len(scores):
        raise InputError(
            f"keep_layers: expected a number from {len(stacks)}, one for each stack, to the model's {len(scores)}, "
            f"got {keep_layers!r}"
        )
    best = {max((n for n in scores if n.partition(".")[0] == stack), key=scores.__getitem__) for stack in stacks}
    order = sorted((name for name in scores if name not in best), key=scores.__getitem__)
    gone = set(order[: len(scores) - keep_layers])
    return [name for name in scores if name in gone]


def block_influence(model: nn.Module, task: Task, batches: Iterable[Batch]) -> dict[str, float]:
    """1 - cos(input, output) of each block's hidden states, the mean over real tokens (Men et al. 2024, arXiv 2403.03853,
    Eq. 1). By name of the block."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}

    def observe(name: str, real: Tensor, before: Tensor, after: Tensor) -> None:
        cosine = nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)[real]
        sums[name] = sums.get(name, 0.0) + float((1 - cosine).sum())
        counts[name] = counts.get(name, 0) + int(real.sum())

    found = blocks(model)
    has_encoder = any(block.stack == "encoder" for block in found.values())
    with undisturbed(model), torch.no_grad():
        for batch in batches:
            # A decoder that has an encoder runs over the target, everything else over the input.
            real = {b.stack: batch.real(target=b.stack == "decoder" and has_encoder) for b in found.values()}
            observers = {block.path: partial(observe, name, real[block.stack]) for name, block in found.items()}
            with _hidden_states(model, observers):
                task.logits(model, batch)
    return {name: sums[name] / counts[name] for name in sums}


def layer_gate_gradients(
    model: nn.Module, task: Task, chosen: Layers, batch: Batch, target: Target, at: float = 1.0
) -> dict[str, Tensor]:
    """dF/dz [B] of each layer's gate, by name, with all gates at one value: at 1, gradient x activation of what the layer adds
    to the residual stream. The model's parameters must be frozen (`undisturbed`)."""
    with torch.enable_grad():
        gates = {name: _gate(model, batch, at).requires_grad_(True) for name in chosen}
        with _gated(model, chosen, gates):
            found = task.target(model, batch, target)
        # Where cross-attention is gone, nothing of the encoder reaches F.
        gradients = torch.autograd.grad(found.sum(), list(gates.values()), allow_unused=True)
    nothing = torch.zeros_like(found)
    return {name: nothing if gradient is None else gradient for name, gradient in zip(gates, gradients, strict=True)}


@torch.no_grad()
def closing_effects(model: nn.Module, task: Task, chosen: Layers, batch: Batch, target: Target) -> dict[str, Tensor]:
    """Integrated gradients of each layer's own gate, the integral of dF/dz over z from 0 to 1 while all other gates are 1 [B].

    It is F(1) - F(z = 0) by the fundamental theorem (completeness, Sundararajan et al. 2017, arXiv 1703.01365), so that two
    forward passes give it exactly where a quadrature rule would need many, and a derivative at each node.
    """
    whole = task.target(model, batch, target)
    found = {}
    for name, of in chosen.items():
        with _gated(model, {name: of}, {name: _gate(model, batch, 0.0)}):
            found[name] = whole - task.target(model, batch, target)
    return found


def joint_gradients(
    model: nn.Module, task: Task, chosen: Layers, batch: Batch, target: Target, *, nodes: int = 16
) -> dict[str, Tensor]:
    """Integrated gradients of each layer's gate [B] along the path on which all gates go from 0 to 1 together: their sum is
    F(1) - F(0) up to the error of a Gauss-Legendre rule of so many nodes."""
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise InputError(f"nodes: expected a positive number, got {nodes!r}")
    found: dict[str, Tensor] = {}
    for at, weight in zip(*gauss(nodes), strict=True):
        for name, gradient in layer_gate_gradients(model, task, chosen, batch, target, float(at)).items():
            found[name] = found[name] + float(weight) * gradient if name in found else float(weight) * gradient
    return found


def _gate(model: nn.Module, batch: Batch, value: float) -> Tensor:
    """A gate for each example [B], in float32 at least."""
    like = next(model.parameters())
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.full((len(batch.labels),), value, dtype=dtype, device=like.device)


def _gated(model: nn.Module, chosen: Layers, gates: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    return gated(model, {branch: gates[name] for name, of in chosen.items() for branch in of})


@contextmanager
def _hidden_states(model: nn.Module, observers: Mapping[str, Callable[[Tensor, Tensor], None]]) -> Iterator[None]:
    """Calls the observer of each module at a path with its hidden states before and after, both [B, T, channels]."""

    def look(
        observe: Callable[[Tensor, Tensor], None], module: nn.Module, arguments: tuple[Any, ...], named: Any, output: Any
    ) -> None:
        before = arguments[0] if arguments else named["hidden_states"]
        observe(before, output if isinstance(output, Tensor) else output[0])

    handles = []
    try:
        for path, observe in observers.items():
            hook = partial(look, observe)
            handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
