"""Classification: one class for each input, whatever the inputs are."""

from __future__ import annotations

import math
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
from secateur.support.fields import whole_number
from secateur.tasks.base import Task
from secateur.tasks.batches import IGNORED, Batch, Item, in_order, model_device
from secateur.tasks.metrics import Evaluation, correlations, f1_scores, proportion
from secateur.tasks.model_config import OutputKind, output_kind


class Classification(Task):
    """One class for each input. Subclasses define `input_items` and `collate_inputs`.

    What an example's target is depends on the model's config:

    * Usually one class is right: the target is its name or number. F is that of the class, and the metric is accuracy.
    * With `problem_type` "multi_label_classification" any number of labels is right: the target is a list of their names or
      numbers. Each label is a class of its own with two outcomes, so F is a sum over all labels: with the log-probability,
      of log sigmoid(logit) for the right ones and log(1 - sigmoid(logit)) for the others. The metrics are micro and macro F1;
      a label is predicted if its probability is above 0.5.
    * A model with one output gives a value (regression, cross-encoders, reward models): the target is a number. F is the output
      itself, whatever kind of F is asked for. The metrics are Pearson's and Spearman's correlation.
    """

    labels_from_model: ClassVar[bool] = True
    decodes_target: ClassVar[bool] = False

    def output_kind(self, model: nn.Module) -> OutputKind:
        """Return the meaning of the model's outputs. Raises InputError for outputs without a known meaning."""
        return output_kind(model)

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        """Return the examples as items. With all_labels a value needs one item for each example, and no target."""
        kind, names, column = self.output_kind(model), self.label_names(model), self.columns[-1]
        inputs = self.input_items(model, examples)
        if kind == "value":
            values = [None if all_labels else _value(e[column], f"examples, row {n}") for n, e in enumerate(examples, start=1)]
            return [replace(item, target=[0], value=value) for item, value in zip(inputs, values, strict=True)]
        if all_labels:
            targets = [[label] for label in range(len(names))]
            if kind == "labels":
                targets = [[1 if other == label else IGNORED for other in range(len(names))] for label in range(len(names))]
            return [replace(item, target=target) for item in inputs for target in targets]
        read = _class_numbers if kind == "labels" else _one_class
        targets = [read(names, e[column], f"examples, row {n}") for n, e in enumerate(examples, start=1)]
        return [replace(item, target=target) for item, target in zip(inputs, targets, strict=True)]

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        """Return the items as one padded batch with labels [B, 1], or [B, labels] where any number of labels is right."""
        return replace(self.collate_inputs(items, device), labels=torch.tensor([item.target for item in items], device=device))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of an ordinary forward pass.

        Returns:
            [B, 1, classes]; [B, 1, 1] for a value; where any number of labels is right, [B, labels, 2] with a logit 0 for a
                label that is wrong, so that a softmax over the two is the sigmoid.
        """
        outputs = self.label_scores(model, batch)  # [B, outputs]
        if self.output_kind(model) == "labels":
            return torch.stack([torch.zeros_like(outputs), outputs], -1)
        return outputs.unsqueeze(1)

    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        """Return the accuracy, the F1 of labels or the correlations of values of a model in eval mode."""
        items, logits, labels, rows = self.items(model, examples), list[Tensor](), list[Tensor](), list[int]()
        for batch in self.batches(items, model_device(model), max_tokens):
            logits.append(self.finite(model, batch, self.logits))
            labels.append(batch.labels)
            rows += batch.rows
        outputs = in_order(logits, rows)  # [examples, 1, classes], or [examples, labels, 2]
        wanted = in_order(labels, rows)  # [examples, 1 or labels]
        kind = self.output_kind(model)
        if kind == "value":
            return correlations(outputs.flatten().tolist(), [item.value for item in items if item.value is not None])
        best = outputs.argmax(-1)
        if kind == "labels":
            return f1_scores(best.bool(), wanted.bool())
        return proportion("accuracy", int((best == wanted).sum()), len(examples))

    def label_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's outputs [B, outputs] for a batch of inputs: logits, or values."""
        output: Any = model(**self.model_inputs(model, batch.inputs))
        outputs: Tensor = output.logits
        return outputs

    def probabilities(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> list[dict[str, float]]:
        """Return for each example's input the probability of each label, by name.

        Where one label is right, they add up to 1. A value stands in the place of the probability.
        """
        kind = self.output_kind(model)
        if kind == "label":
            return super().probabilities(model, examples, max_tokens)
        scores = self.ranked(model, examples, max_tokens).double()
        values = (scores.sigmoid() if kind == "labels" else scores).tolist()
        return [dict(zip(self.label_names(model), of_example, strict=True)) for of_example in values]

    def predictions(self, model: nn.Module, examples: Sequence[Example], max_tokens: int, longest: int) -> list[dict[str, Any]]:
        """Return the predicted class, the list of the predicted labels, or the value, as in `Task`. A value has no `p_`."""
        kind = self.output_kind(model)
        if kind == "label":
            return super().predictions(model, examples, max_tokens, longest)
        rows = self.probabilities(model, examples, max_tokens)
        if kind == "value":
            return [{"prediction": value} for row in rows for value in row.values()]
        return [
            {"prediction": [label for label, p in row.items() if p > 0.5], **{f"p_{label}": p for label, p in row.items()}}
            for row in rows
        ]

    def expected(self, model: nn.Module, examples: Sequence[Example]) -> list[Any]:
        """Return the examples' targets in the form of `predictions`."""
        kind, names, column = self.output_kind(model), self.label_names(model), self.columns[-1]
        expected: list[Any] = []
        for number, example in enumerate(examples, start=1):
            where, target = f"examples, row {number}", example[column]
            if kind == "value":
                expected.append(_value(target, where))
            elif kind == "labels":
                expected.append(
                    [name for name, right in zip(names, _class_numbers(names, target, where), strict=True) if right]
                )
            else:
                expected.append(names[class_number(names, target, where)])
        return expected

    def label_names(self, model: nn.Module) -> list[str]:
        """Return the classes in the order of the model's outputs."""
        return class_names(model, self.labels)

    def require_fit(self, model: nn.Module) -> None:
        """Refuse a model that does not fit the task.

        Raises:
            InputError: As for every task, or as `output_kind`.
        """
        super().require_fit(model)
        self.output_kind(model)

    def training_batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return items as keyword arguments of the model's forward pass, with labels for the model's own loss.

        The labels are classes [B], or float: values [B], or for each label whether it is right [B, labels].
        """
        batch = super().training_batch(items)
        values = [item.value for item in items if item.value is not None]
        if values:
            return {**batch, "labels": torch.tensor(values, dtype=torch.float32)}
        several = batch["labels"].shape[1] > 1
        return {**batch, "labels": batch["labels"].float() if several else batch["labels"].squeeze(1)}


def _one_class(names: Sequence[str], value: Any, where: str) -> list[int]:
    """Return the number of the one class that a target names."""
    return [class_number(names, value, where)]


def _class_numbers(names: Sequence[str], value: Any, where: str) -> list[int]:
    """Return for each label 1 if the target names it, else 0. Raises InputError for another target than a list of labels."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: expected a list of labels, of which any number may be right, got {value!r}")
    if len(value) == len(names) and all(isinstance(one, (int, float)) and one in (0, 1) for one in value):
        raise InputError(f"{where}: expected the names of the right labels, got {value!r}, which may be numbers or marks")
    right = [class_number(names, one, where) for one in value]
    if len(set(right)) < len(right):
        raise InputError(f"{where}: expected each label once, got {value!r}")
    return [int(label in right) for label in range(len(names))]


def _value(value: Any, where: str) -> float:
    """Return the number that a target is, or that a text writes. Raises InputError for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: expected a number as target, as the model has one output, got {value!r}")
    return number


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
        return whole_number(value)
    if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _listed(names: Sequence[str]) -> str:
    """The first names, for an error message."""
    return ", ".join(map(repr, names[:12])) + (" ..." if len(names) > 12 else "")
