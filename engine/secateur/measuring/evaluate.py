"""evaluate: a task's metric on examples, with its confidence interval."""

from __future__ import annotations

import torch
from torch import nn

from secateur.data.examples import Examples
from secateur.model.undisturbed import undisturbed
from secateur.tasks import Evaluation, Task
from secateur.tasks.base import require_fit


def evaluate(model: nn.Module, task: Task, examples: Examples, *, max_tokens: int = 8192) -> Evaluation:
    """Evaluate a model on a task: accuracy, exact match, entity F1 or perplexity, with its 95% interval.

    Args:
        model: The model, dense or pruned.
        task: The task, which decides the metric.
        examples: Examples, as in `attribute`.
        max_tokens: Padded input tokens in a batch.

    Raises:
        InputError: The examples cannot be used, or the model does not fit the task.
    """
    require_fit(task, model)
    rows = task.read(examples)
    with undisturbed(model), torch.inference_mode():
        return task.evaluate(model, rows, max_tokens)
