"""Classification: one class for each input, whatever the inputs are."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.data.examples import ClassName, Example
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

    Labels that are the model's own names, in any order and in upper or lower case, are matched by name. Labels of which none is
    among the model's names rename the outputs by position.

    Args:
        model: The model, whose `config.id2label` names its classes.
        labels: The task's names, which replace the model's.

    Raises:
        InputError: `config.id2label` does not number the outputs from 0, or gives two of them one name; the task has another
            number of labels than the model has classes; or some labels are among the model's names and others are not.
    """
    own = _own_names(model)
    if labels is None:
        twice = [name for name, count in Counter(own).items() if count > 1]
        if twice:
            raise InputError(f"model: expected different names in its config's id2label, got {twice[0]!r} twice; give labels")
        return own
    if len(labels) != len(own):
        raise InputError(f"labels: expected the model's {len(own)} classes, got {len(labels)}: {list(labels)!r}")
    keys, own_keys = _keys(labels, own)
    if not set(keys) & set(own_keys):
        return list(labels)
    if set(keys) != set(own_keys):
        raise InputError(
            f"labels: expected the model's own names {_listed(own)}, or other names than these for its outputs in their order, "
            f"got {_listed(labels)}"
        )
    return [labels[keys.index(key)] for key in own_keys]


def class_number(names: Sequence[str], value: Any, where: str, *, numbers: bool = True) -> int:
    """Return the output that a class name or number stands for.

    A text is a name, or a number where no class has it as its name, as in "0" of a CSV file. The number of a data set's
    ClassLabel stands for its name in the data set. It is a number of the model only where the model's names are LABEL_0 and on.

    Args:
        names: The class names in the order of the outputs.
        value: A name or a number. Integers of NumPy and torch are numbers too.
        where: The place of the value, which the error message begins with.
        numbers: Whether numbers are taken too.

    Raises:
        InputError: No class has this name or number, or a number is the name of another class.
    """
    if isinstance(value, str) and value in names:
        return names.index(value)
    number = _whole(value)
    if isinstance(value, ClassName) and number != value.number:
        if len(value.names) != len(names) or any(name != f"LABEL_{i}" for i, name in enumerate(names)):
            raise InputError(
                f"{where}: expected a target among the labels {_listed(names)}, got {str(value)!r}, class {value.number} "
                "of the data set: give labels, the data set's names in the order of the model's outputs"
            )
        number = value.number
    if number is None or not numbers or not 0 <= number < len(names):
        or_number = " or its number" if numbers else ""
        raise InputError(f"{where}: expected a target among the labels {_listed(names)}{or_number}, got {value!r}")
    if str(number) in names and names[number] != str(number):
        raise InputError(
            f"{where}: expected a name as text, got the number {number}, the name of one class and the place of another"
        )
    return number


def _own_names(model: nn.Module) -> list[str]:
    """The names of the model's outputs in `config.id2label`. Raises InputError if they are not numbered from 0, one by one."""
    id2label: Any = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(id2label, Mapping):
        raise InputError("model: expected the names of its classes in its config's id2label, got none")
    names = {_whole(number): str(name) for number, name in id2label.items()}
    outputs = getattr(model, "num_labels", len(names))
    if sorted(names, key=str) != sorted(range(outputs), key=str):
        raise InputError(
            f"model: expected its config's id2label to number its {outputs} outputs from 0 to {outputs - 1}, "
            f"got {_listed([str(number) for number in id2label])}"
        )
    return [names[number] for number in range(outputs)]


def _keys(labels: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """The labels and the model's names as they are compared: without regard to case, unless case alone tells some apart."""
    folded = [name.casefold() for name in labels], [name.casefold() for name in own]
    plain = list(labels), list(own)
    return plain if any(len(set(keys)) < len(keys) for keys in folded) else folded


def _whole(value: Any) -> int | None:
    """The number that an integer or a text of digits stands for, None for anything else. True and False are no numbers."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdecimal() else None
    if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _listed(names: Sequence[str]) -> str:
    """The first names, for an error message."""
    return ", ".join(map(repr, names[:12])) + (" ..." if len(names) > 12 else "")
