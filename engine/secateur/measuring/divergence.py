"""How far a model's predictions are from another's: the Kullback-Leibler divergence at the target positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.model.undisturbed import undisturbed
from secateur.tasks import Batch, Task
from secateur.tasks.batches import IGNORED


def divergence(
    model: nn.Module, pruned: nn.Module, task: Task, batches: Sequence[Batch], logits: Sequence[Tensor] = ()
) -> float:
    """Measure how far the pruned model's predictions are from the dense model's.

    It is the mean over examples of the Kullback-Leibler divergence, summed over the target positions (or labels, where any
    number of them is right). For a model with one output, half the squared difference of the values.

    Args:
        model: The dense model.
        pruned: The pruned model.
        task: The task.
        batches: The batches to compare on.
        logits: The dense model's `held_logits` of these batches. Where there are none, the dense model runs.

    Returns:
        Nats for each example.

    Raises:
        InputError: Logits are NaN or inf.
    """
    total, examples = 0.0, 0
    with undisturbed(model), undisturbed(pruned), torch.inference_mode(), task.sharing(model), task.sharing(pruned):
        for k, batch in enumerate(batches):
            dense = logits[k] if logits else target_logits(model, task, batch)
            total += float(divergence_of(dense, target_logits(pruned, task, batch)).sum())
            examples += len(batch.labels)
    return total / examples


def held_logits(model: nn.Module, task: Task, batches: Sequence[Batch], most: int) -> list[Tensor]:
    """Return a model's `target_logits` of all batches; none if they take more bytes than `most`."""
    with undisturbed(model), torch.inference_mode(), task.sharing(model):
        first = target_logits(model, task, batches[0])
        positions = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        if first[:1].nbytes * positions > most:
            return []
        return [first, *(target_logits(model, task, batch) for batch in batches[1:])]


def target_logits(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    """Return a model's logits at a batch's target positions, float64 [target positions, classes].

    Raises:
        InputError: Logits are NaN or inf.
    """
    return task.finite(model, batch, task.logits)[batch.labels != IGNORED].double()


def divergence_of(dense: Tensor, other: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of each position's predictions [positions], from logits [positions, classes].

    A model with one output predicts a value. Half the squared difference is the divergence of normal distributions of variance
    1 around the values.
    """
    if dense.shape[1] == 1:
        return (dense - other).square().sum(1) / 2
    log_p, log_q = dense.log_softmax(1), other.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
