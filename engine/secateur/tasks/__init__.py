"""Tasks: how examples become batches, and how a model's outputs are scored."""

from __future__ import annotations

from secateur.tasks.base import Target, Task
from secateur.tasks.batches import Batch, Item
from secateur.tasks.causal import CausalLM
from secateur.tasks.classification import Classification
from secateur.tasks.image import ImageClassification
from secateur.tasks.metrics import Evaluation
from secateur.tasks.prompt import Prompt
from secateur.tasks.sequence import SequenceClassification
from secateur.tasks.text import TextTask
from secateur.tasks.text_to_text import TextToText
from secateur.tasks.token import TokenClassification

__all__ = [
    "Batch",
    "CausalLM",
    "Classification",
    "Evaluation",
    "ImageClassification",
    "Item",
    "Prompt",
    "SequenceClassification",
    "Target",
    "Task",
    "TextTask",
    "TextToText",
    "TokenClassification",
]
