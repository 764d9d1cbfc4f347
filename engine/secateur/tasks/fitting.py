"""Whether a task's tokenizer and a model belong together, found out before a pass fails deep inside."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.support.errors import InputError
from secateur.tasks.base import Task


def require_fit(model: nn.Module, task: Task) -> None:
    """Raises InputError: a model of transformers that is of another kind than the task's, or whose embedding has fewer rows
    than the task's tokenizer has pieces. More rows are fine: many are padded to a round number."""
    import transformers

    config: Any = getattr(model, "config", None)
    if isinstance(model, transformers.PreTrainedModel) and type(model).__module__.startswith("transformers."):
        known = getattr(transformers, task.auto_class)._model_mapping.get(type(config), ())
        if not isinstance(model, tuple(known) if isinstance(known, (list, tuple)) else known):
            raise InputError(
                f"model: expected one of {task.auto_class} for {type(task).__name__}, got a {type(model).__name__}"
            )
    require_rows(model, task.tokenizer)


def require_rows(model: nn.Module, tokenizer: Any) -> None:
    """Raises InputError for a tokenizer with more pieces than the model's embedding has rows."""
    if not hasattr(tokenizer, "__len__"):
        return  # An image processor.
    try:
        rows, pieces = len(model.get_input_embeddings().weight), len(tokenizer)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return  # A model of somebody's own, which does not say where its embedding is.
    if pieces > rows:
        raise InputError(
            f"tokenizer: expected at most {rows} pieces, the rows of the model's embedding, got a tokenizer with {pieces}: "
            "does it belong to the model?"
        )
