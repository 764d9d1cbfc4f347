"""Sequence classification: one class for each text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.support.errors import InputError
from secateur.tasks.base import Task
from secateur.tasks.batches import Batch, Item, model_device
from secateur.tasks.metrics import Evaluation, proportion


class SequenceClassification(Task):
    """labels: the class names in the order of the model's outputs; by default the model's own (config.id2label).

    An example's target is a class name or its number. Metric: accuracy.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        names = class_names(model, self.labels)
        inputs = self._encode_cut(examples)
        if all_labels:
            return [Item(row, ids, [label]) for row, ids in enumerate(inputs) for label in range(len(names))]
        targets = [class_number(names, e["target"], f"examples, row {n}") for n, e in enumerate(examples, start=1)]
        return [Item(row, ids, [target]) for row, (ids, target) in enumerate(zip(inputs, targets, strict=True))]

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        return Batch(
            self._inputs(items, device),
            torch.tensor([item.target for item in items], device=device),
            [item.row for item in items],
        )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        output: Any = model(**batch.inputs)
        logits: Tensor = output.logits
        return logits.unsqueeze(1)

    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        right = 0
        for batch in self.batches(self.items(model, examples), model_device(model), max_tokens):
            right += int((self.logits(model, batch).argmax(-1) == batch.labels).sum())
        return proportion("accuracy", right, len(examples))

    def label_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.logits(model, batch).squeeze(1)

    def label_names(self, model: nn.Module) -> list[str]:
        return class_names(model, self.labels)


def class_names(model: nn.Module, labels: Sequence[str] | None) -> list[str]:
    """The classes in output order: the task's, which must be as many as the model's, or the model's own."""
    id2label: dict[int, str] = model.config.id2label  # type: ignore[union-attr, assignment]
    if labels is None:
        return [id2label[i] for i in range(len(id2label))]
    if len(labels) != len(id2label):
        raise InputError(f"labels: expected the model's {len(id2label)} classes, got {len(labels)}: {list(labels)!r}")
    return list(labels)


def class_number(names: Sequence[str], value: Any, where: str) -> int:
    """The output that a class name or number stands for. Raises InputError, with `where`, if there is none."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    if isinstance(value, str) and value in names:
        return names.index(value)
    expected = ", ".join(map(repr, names[:12])) + (" ..." if len(names) > 12 else "")
    raise InputError(f"{where}: expected a target among the labels {expected} or its number, got {value!r}")
