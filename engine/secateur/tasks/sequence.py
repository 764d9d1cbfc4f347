"""Sequence classification: one class for each text."""

from __future__ import annotations

from typing import ClassVar

from secateur.tasks.classification import Classification
from secateur.tasks.text import TextTask


class SequenceClassification(Classification, TextTask):
    """One class for each text.

    An example's target is a class name or its number. The metric is accuracy.

    Args:
        tokenizer: The model's tokenizer.
        labels: The class names: the model's own (config.id2label, the default) in any order, or others in the order of the
            model's outputs.
        max_length: The most pieces of an input; by default the tokenizer's own limit.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    name: ClassVar[str] = "sequence-classification"
    architecture: ClassVar[str] = "ForSequenceClassification"
