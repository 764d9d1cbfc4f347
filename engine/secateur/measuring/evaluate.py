"""evaluate and predict: a task's metric on examples, with its confidence interval, and what a model says of each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.data.examples import Examples
from secateur.model.undisturbed import undisturbed
from secateur.support.fields import require_count
from secateur.support.progress import Progress, require_progress, watching
from secateur.tasks import Evaluation, Task
from secateur.tasks.base import require_fit


def evaluate(
    model: nn.Module, task: Task, examples: Examples, *, max_tokens: int = 8192, progress: Progress | None = None
) -> Evaluation:
    """Evaluate a model on a task: accuracy, exact match, entity F1 or perplexity, with its 95% interval.

    Args:
        model: The model, dense or pruned.
        task: The task, which decides the metric.
        examples: Examples, as in `attribute`.
        max_tokens: Padded input tokens in a batch.
        progress: True for a progress bar (tqdm's, a widget in a notebook), or a function of (examples done, all examples).

    Raises:
        InputError: The examples cannot be used, or the model does not fit the task.
    """
    require_progress(progress)
    require_fit(task, model)
    rows = task.read(examples)
    with undisturbed(model), torch.inference_mode(), watching(progress, "evaluating", len(rows)):
        return task.evaluate(model, rows, max_tokens)


def predict(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    max_tokens: int = 8192,
    longest: int = 64,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Return what a model says of each example, beside what is right.

    Args:
        model: The model, dense or pruned.
        task: The task.
        examples: Examples, as in `attribute`.
        max_tokens: Padded input tokens in a batch.
        longest: The most pieces of a generated text, where targets are open.
        progress: As in `evaluate`.

    Returns:
        A row for each example, for example for `pandas.DataFrame`: the example's columns, its target as a label's name;
            `prediction`; for each candidate label `p_LABEL`, its probability; and, except for values, `right`.

    Raises:
        InputError: The examples cannot be used, or the model does not fit the task.
    """
    require_progress(progress)
    require_fit(task, model)
    require_count("longest", longest)
    rows = task.read(examples)
    with undisturbed(model), torch.inference_mode(), watching(progress, "predicting", len(rows)):
        expected, predicted = task.expected(model, rows), task.predictions(model, rows, max_tokens, longest)
    table = []
    for row, target, said in zip(rows, expected, predicted, strict=True):
        right = {} if isinstance(target, float) else {"right": said["prediction"] == target}
        table.append({**row, task.columns[-1]: target, **said, **right})
    return table
