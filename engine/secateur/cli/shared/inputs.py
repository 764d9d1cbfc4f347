"""Turn the arguments of a command into a model, a task, examples and a criterion."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from secateur import tasks
from secateur.attribution.criteria import Criterion, criterion_named, for_all_labels
from secateur.cli.shared.tagged import tagged_examples
from secateur.data.examples import Example, read_examples
from secateur.flow.choose import RECOVERIES
from secateur.flow.compress import preferred_alignment
from secateur.flow.loaded import Loaded, load_model, make_task, task_labels
from secateur.measuring.synthetic import MOST
from secateur.recovery import Method
from secateur.support.environment import require_threads
from secateur.support.errors import InputError
from secateur.support.fields import require_count, shown, whole_number
from secateur.tasks import TokenClassification
from secateur.tasks.classification import class_names

COLUMN_FILE = ".conll"
# The columns of the tags and of the tokens in a column file. The first is None if the data is no column file.
Columns = tuple[str | None, str]


def prepare(
    model: str,
    data: str,
    *,
    task: str | None,
    labels: str,
    examples: int | None,
    max_length: int | None,
    device: str,
    dtype: str,
    device_map: str | None = None,
    unlabeled: bool = False,
    columns: Columns = (None, "1"),
) -> tuple[Loaded, tasks.Task, list[Example]]:
    """Load the model, the task and the examples of a command.

    Args:
        model: A folder, a Hub name, or "builtin".
        data: The examples, as in `read`.
        task: The kind of task; None for the model's own kind.
        labels: The candidate labels, as in `make_task`. The targets of all rows may tell them.
        examples: Return only that many rows, the first ones; None for all.
        max_length: Inputs are cut after that many tokens.
        device: The device, as in `load_model`.
        dtype: The dtype, as in `load_model`.
        device_map: How Accelerate spreads the model, in place of `device`.
        unlabeled: Do not read the targets.
        columns: The columns of a column file.

    Returns:
        The model, its task, and the rows.

    Raises:
        InputError: As in `load_model`, `read` and `make_task`.
    """
    loaded = load_model(model, task=task, device=device, dtype=dtype, device_map=device_map)
    rows = read(data, loaded, columns, labels, unlabeled=unlabeled)
    return loaded, make_task(loaded, labels, rows, max_length), rows[:examples]


def read(
    data: str, loaded: Loaded, columns: Columns = (None, "1"), labels: str = "auto", *, unlabeled: bool = False
) -> list[Example]:
    """Read the examples of a model's task.

    Args:
        data: A file, a Hub name or "builtin:...", as in `read_examples`; or a column file, with `columns`.
        loaded: The model.
        columns: The columns of the tags and of the tokens in a column file.
        labels: The candidate labels, as in `make_task`. The tags of a column file must be among them.
        unlabeled: Read the first column of the task only, not the targets.

    Returns:
        The rows, with the columns of the task.

    Raises:
        InputError: The examples cannot be read, a column file comes without the column of its tags, or that column is given
            for a model whose task is not token-classification.
    """
    column, token = columns
    if column is None:
        if Path(data).suffix == COLUMN_FILE:
            raise InputError(f"column: expected the column of the tags, as {data!r} is a column file, got none")
        names = loaded.task_class.columns
        return read_examples(data, names[:1] if unlabeled else names)
    if "tags" not in loaded.task_class.columns:
        raise InputError(f"column: expected a model for {TokenClassification.name}, got one for {loaded.task}")
    return tagged_examples(data, column, token, class_names(loaded.model, task_labels(loaded, labels, [])))


def among(name: str, text: str | None, known: Collection[str], default: Collection[str] | None = None) -> tuple[str, ...]:
    """Return the names between commas; without any, the default, or else all known names.

    Raises:
        InputError: A name is unknown.
    """
    if text is None:
        return tuple(known if default is None else default)
    chosen = tuple(text.split(","))
    for choice in chosen:
        if choice not in known:
            raise InputError(f"{name}: expected some of {', '.join(known)}, got {choice!r}")
    return chosen


def make_criterion(name: str, target: str | None, over_examples: str | None, unlabeled: bool) -> Criterion:
    """Return the criterion, with the fields that options set. With `unlabeled` it scores for all candidate labels.

    Raises:
        InputError: The criterion is unknown, or lacks a setting that an option sets.
    """
    criterion = for_all_labels(criterion_named(name)) if unlabeled else criterion_named(name)
    options = {"target": ("target", target), "over-examples": ("over_examples", over_examples)}
    known = {field.name for field in fields(criterion)}
    for option, (field, value) in options.items():
        if value is not None and field not in known:
            raise InputError(f"{option}: expected a criterion with the setting {field!r}, such as gradient, got {name!r}")
    return replace(criterion, **{field: value for field, value in options.values() if value is not None})


def unit(name: str) -> Literal["head", "channel"]:
    """Return the unit of attention that is pruned."""
    if name == "head":
        return "head"
    if name == "channel":
        return "channel"
    raise InputError(f"unit: expected head or channel, got {name!r}")


def numbers(text: str, name: str, kind: type = int) -> Sequence[Any]:
    """Parse positive numbers between commas. `name` is the option, for error messages."""
    try:
        parsed = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{name}: expected numbers between commas, got {text!r}") from error
    if not all(number > 0 for number in parsed):
        raise InputError(f"{name}: expected positive numbers, got {text!r}")
    return parsed


def shapes(batch_sizes: str, lengths: str) -> tuple[Sequence[int], Sequence[int]]:
    """Parse batch sizes and lengths to time. Raise InputError for a number that is not positive, or above that of `MOST`."""
    parsed = {
        name: numbers(text, name.replace("_", "-")) for name, text in (("batch_sizes", batch_sizes), ("lengths", lengths))
    }
    for name, sizes in parsed.items():
        for size in sizes:
            require_count(name.replace("_", "-"), size, most=MOST[name])
    return parsed["batch_sizes"], parsed["lengths"]


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads, if it is given. Raise InputError for a number that the machine cannot start."""
    if threads is not None:
        require_threads(threads)
        torch.set_num_threads(threads)


def recoveries(name: str, tries: bool) -> tuple[Method | None, ...]:
    """Return the methods of recovery that a name stands for. `tries` also allows auto."""
    by_name: dict[str, tuple[Method | None, ...]] = {
        "least-squares": ("least_squares",), "scale": ("scale",), "bias": ("bias",), "none": (None,)
    }  # fmt: skip
    if tries:
        by_name["auto"] = RECOVERIES
    if name not in by_name:
        raise InputError(f"recover: expected one of {', '.join(by_name)}, got {name!r}")
    return by_name[name]


def alignment(value: str, device: str) -> int:
    """Return the multiple of FFN widths. auto: tiles of 64 for a GPU's matrix units, vectors of 16 floats on a CPU."""
    if value == "auto":
        return preferred_alignment(device)
    multiple = whole_number(value)
    if not multiple:
        raise InputError(f"align: expected 'auto' or a positive number, got {shown(value)}")
    return multiple
