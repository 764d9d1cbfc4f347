"""Load a tokenizer, and check that a task's tokenizer and a model belong together before a forward pass fails."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from secateur.support.compat import auto_model_classes
from secateur.support.errors import InputError
from secateur.tasks.base import Task


def require_fit(model: nn.Module, task: Task) -> None:
    """Raises InputError: a model of transformers that is of another kind than the task's, or whose embedding has fewer rows
    than the task's tokenizer has pieces. More rows are fine: many are padded to a round number."""
    import transformers

    config: Any = getattr(model, "config", None)
    stock = isinstance(model, transformers.PreTrainedModel) and type(model).__module__.startswith("transformers.")
    if stock and not isinstance(model, auto_model_classes(task.auto_class, config)):
        raise InputError(f"model: expected one of {task.auto_class} for {type(task).__name__}, got a {type(model).__name__}")
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


def read_tokenizer(folder: str, auto_class: str = "AutoTokenizer") -> Any:
    """Load a tokenizer or an image processor.

    Args:
        folder: A folder or a name on the Hub.
        auto_class: The class of transformers that loads it, e.g. "AutoTokenizer" or "AutoImageProcessor".

    Returns:
        The tokenizer or the image processor.

    Raises:
        InputError: The tokenizer needs sentencepiece or protobuf, and the package is not installed. Marian folders need it,
            and so do mT5 and T5 folders without a tokenizer.json.
    """
    import transformers

    try:
        return getattr(transformers, auto_class).from_pretrained(folder)
    except (ImportError, ValueError) as error:
        # ImportError for Marian and ValueError for T5; T5's names tiktoken where sentencepiece and protobuf are enough.
        needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        missing = [package for package, module in needed.items() if not _installed(module)]
        if missing and any(package in str(error).lower() for package in (*needed, "tiktoken")):
            raise InputError(
                f"tokenizer: expected {' and '.join(missing)} to be installed, which the tokenizer of {folder!r} needs, "
                "got none; pip install 'secateur[sentencepiece]'"
            ) from error
        raise


def _installed(package: str) -> bool:
    """Return True if the package can be imported. The import does not run."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False  # The parent of a dotted name is missing.
