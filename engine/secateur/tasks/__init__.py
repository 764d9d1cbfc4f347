"""Tasks: how examples become batches, and what a model's output is worth on them."""

from __future__ import annotations

from secateur.tasks.base import Target, Task
from secateur.tasks.batches import Batch, Item
from secateur.tasks.causal import CausalLM
from secateur.tasks.image import ImageClassification
from secateur.tasks.metrics import Evaluation
from secateur.tasks.sequence import SequenceClassification
from secateur.tasks.text_to_text import TextToText
from secateur.tasks.token import TokenClassification

__all__ = [
    "Batch",
    "CausalLM",
    "Evaluation",
    "ImageClassification",
    "Item",
    "SequenceClassification",
    "Target",
    "Task",
    "TextToText",
    "TokenClassification",
]
