"""evaluate: a task's metric on examples, with its interval."""

from __future__ import annotations

import torch
from torch import nn

from secateur.data.examples import Examples, read_examples
from secateur.model.undisturbed import undisturbed
from secateur.tasks import Evaluation, Task


def evaluate(model: nn.Module, task: Task, examples: Examples, *, max_tokens: int = 8192) -> Evaluation:
    """The task's metric of a model: accuracy, exact match, entity F1 or perplexity, with its 95% interval.

    max_tokens: padded input tokens in a batch. Examples as in `attribute`. Raises InputError for unusable ones.
    """
    task.require_fit(model)
    rows = read_examples(examples, task.columns)
    with undisturbed(model), torch.inference_mode():
        return task.evaluate(model, rows, max_tokens)
