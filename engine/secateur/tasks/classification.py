"""Classification: one class for each input, whatever the inputs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.support.errors import InputError
from secateur.tasks.base import Task
from secateur.tasks.batches import Batch, Item, model_device
from secateur.tasks.metrics import Evaluation, proportion


class Classification(Task):
    """One class for each input. Subclasses define `input_items` and `collate_inputs`.

    An example's target is a class name or its number. The metric is accuracy.
    """

    labels_from_model: ClassVar[bool] = True

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        """Return the examples as items, whose target is one class."""
        names, column = self.label_names(model), self.columns[-1]
        inputs = self.input_items(model, examples)
        if all_labels:
            return [replace(item, target=[label]) for item in inputs for label in range(len(names))]
        targets = [class_number(names, e[column], f"examples, row {n}") for n, e in enumerate(examples, start=1)]
        return [replace(item, target=[target]) for item, target in zip(inputs, targets, strict=True)]

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        """Return the items as one padded batch with labels [B, 1]."""
        return replace(self.collate_inputs(items, device), labels=torch.tensor([item.target for item in items], device=device))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits [B, 1, classes] of an ordinary forward pass."""
        output: Any = model(**batch.inputs)
        logits: Tensor = output.logits
        return logits.unsqueeze(1)

    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        """Return the accuracy of a model in eval mode."""
        right = 0
        for batch in self.batches(self.items(model, examples), model_device(model), max_tokens):
            right += int((self.logits(model, batch).argmax(-1) == batch.labels).sum())
        return proportion("accuracy", right, len(examples))

    def label_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits [B, classes] of a batch of inputs."""
        return self.logits(model, batch).squeeze(1)

    def label_names(self, model: nn.Module) -> list[str]:
        """Return the classes in the order of the model's outputs."""
        return class_names(model, self.labels)

    def training_batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return items as keyword arguments of the model's forward pass, with labels [B]."""
        batch = super().training_batch(items)
        return {**batch, "labels": batch["labels"].squeeze(1)}


def class_names(model: nn.Module, labels: Sequence[str] | None) -> list[str]:
    """Return the classes in the order of the model's outputs.

    Args:
        model: The model, whose `config.id2label` names its classes.
        labels: The task's names, which replace the model's.

    Raises:
        InputError: The task has another number of labels than the model has classes.
    """
    id2label: dict[int, str] = model.config.id2label  # type: ignore[union-attr, assignment]
    if labels is None:
        return [id2label[i] for i in range(len(id2label))]
    if len(labels) != len(id2label):
        raise InputError(f"labels: expected the model's {len(id2label)} classes, got {len(labels)}: {list(labels)!r}")
    return list(labels)


def class_number(names: Sequence[str], value: Any, where: str) -> int:
    """Return the output that a class name or number stands for.

    Args:
        names: The class names in the order of the outputs.
        value: A name or a number.
        where: The place of the value, which the error message begins with.

    Raises:
        InputError: No class has this name or number.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    if isinstance(value, str) and value in names:
        return names.index(value)
    expected = ", ".join(map(repr, names[:12])) + (" ..." if len(names) > 12 else "")
    raise InputError(f"{where}: expected a target among the labels {expected} or its number, got {value!r}")
