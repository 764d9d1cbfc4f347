"""Sequence classification: one class for each text."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from secateur.tasks.classification import Classification
from secateur.tasks.text import TextTask


class SequenceClassification(Classification, TextTask):
    """One class for each text.

    An example's target is a class name or its number. The metric is accuracy.

    Args:
        tokenizer: The model's tokenizer.
        labels: The class names: the model's own (config.id2label, the default) in any order, or others in the order of the
            model's outputs.
        max_length: The most pieces of an input; by default the tokenizer's own limit, else the model's positions.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    name: ClassVar[str] = "sequence-classification"

    def why_not(self, model: nn.Module, ids: list[int]) -> str | None:
        """Return why the model cannot take an input: it reads a text at its end mark, and there is none, or one too many."""
        config: Any = getattr(model, "config", None)
        end = getattr(config, "eos_token_id", None) if getattr(config, "is_encoder_decoder", False) else None
        if end is None or ids.count(end) == self._marks.count(end) > 0:
            return None
        return f"{ids.count(end)} end marks, at the last of which {type(model).__name__} reads a text; expected one"
