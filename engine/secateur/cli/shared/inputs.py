"""From a command's arguments to a model, a task, examples and a criterion."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from secateur import tasks
from secateur.attribution.criteria import Criterion, criterion_named
from secateur.cli.shared.tagged import tagged_examples
from secateur.data.examples import Example, read_examples
from secateur.flow.choose import RECOVERIES
from secateur.flow.compress import preferred_alignment
from secateur.flow.loaded import Loaded, load_model, make_task, task_labels
from secateur.recovery import Method
from secateur.support.errors import InputError
from secateur.tasks import TokenClassification
from secateur.tasks.classification import class_names

COLUMN_FILE = ".conll"
# The columns of a column file: that of the tags, None where the data is no column file, and that of the tokens.
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
    """What every verb that sees examples needs: the model, its task (of all rows, whose targets may tell the labels) and the
    first `examples` rows. unlabeled: targets are not read."""
    loaded = load_model(model, task=task, device=device, dtype=dtype, device_map=device_map)
    rows = read(data, loaded, columns, labels, unlabeled=unlabeled)
    return loaded, make_task(loaded, labels, rows, max_length), rows[:examples]


def read(
    data: str, loaded: Loaded, columns: Columns = (None, "1"), labels: str = "auto", *, unlabeled: bool = False
) -> list[Example]:
    """Examples with the columns of a model's task, or the first of them alone; "builtin:..." as in `read_examples`. columns:
    where they are in a column file, whose tags are among the labels (those of `make_task`)."""
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
    """Names between commas, which must be known; without any the default, all known ones if there is none."""
    if text is None:
        return tuple(known if default is None else default)
    chosen = tuple(text.split(","))
    for each in chosen:
        if each not in known:
            raise InputError(f"{name}: expected some of {', '.join(known)}, got {each!r}")
    return chosen


def make_criterion(name: str, target: str | None, over_examples: str | None, unlabeled: bool) -> Criterion:
    """A criterion with the fields that options change. unlabeled: for all candidate labels, whose signed scores would cancel:
    they become absolute unless told otherwise."""
    criterion = criterion_named(name)
    if unlabeled and getattr(criterion, "over_examples", None) == "signed":
        over_examples = over_examples or "absolute"
    options = {
        "unlabeled": ("labels", "all" if unlabeled else None),
        "target": ("target", target),
        "over-examples": ("over_examples", over_examples),
    }
    known = {field.name for field in fields(criterion)}
    for option, (field, value) in options.items():
        if value is not None and field not in known:
            raise InputError(f"{option}: expected a criterion with the setting {field!r}, such as gradient, got {name!r}")
    return replace(criterion, **{field: value for field, value in options.values() if value is not None})


def unit(name: str) -> Literal["head", "channel"]:
    """The unit of attention that is pruned."""
    if name == "head":
        return "head"
    if name == "channel":
        return "channel"
    raise InputError(f"unit: expected head or channel, got {name!r}")


def numbers(text: str, name: str, kind: type = int) -> Sequence[Any]:
    """Positive numbers between commas."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{name}: expected numbers between commas, got {text!r}") from error
    if not all(number > 0 for number in found):
        raise InputError(f"{name}: expected positive numbers, got {text!r}")
    return found


def use_threads(threads: int | None) -> None:
    """CPU threads from here on, if they were given."""
    if threads is not None:
        torch.set_num_threads(threads)


def recoveries(name: str, tries: bool) -> tuple[Method | None, ...]:
    """The recoveries that a name stands for."""
    found: dict[str, tuple[Method | None, ...]] = {
        "least-squares": ("least_squares",), "scale": ("scale",), "bias": ("bias",), "none": (None,)
    }  # fmt: skip
    if tries:
        found["auto"] = RECOVERIES
    if name not in found:
        raise InputError(f"recover: expected one of {', '.join(found)}, got {name!r}")
    return found[name]


def alignment(value: str, device: str) -> int:
    """auto: what the device's matrix units take whole, tiles of 64 on an accelerator and vectors of 16 floats on a CPU."""
    if value == "auto":
        return preferred_alignment(device)
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"align: expected 'auto' or a positive number, got {value!r}")
    return int(value)
