"""Turn the arguments of a command into a model, a task, examples and a criterion."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from secateur import tasks
from secateur.attribution.criteria import Criterion, criterion_named, for_all_labels
from secateur.cli.shared.tagged import tagged_examples
from secateur.data.examples import FORMATS, Example
from secateur.data.formats import format_of
from secateur.flow.choose import RECOVERIES
from secateur.flow.compress import preferred_alignment
from secateur.flow.loaded import Loaded, load_model, make_task, prompt_of, read_for, task_labels
from secateur.measuring.synthetic import MOST
from secateur.recovery import Method
from secateur.support.environment import require_threads
from secateur.support.errors import InputError
from secateur.support.fields import require_count, shown, whole_number
from secateur.tasks import TokenClassification
from secateur.tasks.classification import class_names

COLUMN_FILE = ".conll"


@dataclass(frozen=True)
class DataOptions:
    """The options of a command about its data.

    Attributes:
        input_column: --input-column.
        target_column: --target-column.
        prompt: --prompt, --chat and --system, as `prompt_named` makes them.
        labels: --labels.
        unlabeled: --unlabeled: the targets are not read.
    """

    input_column: str | None = None
    target_column: str | None = None
    prompt: tasks.Prompt | None = None
    labels: str = "auto"
    unlabeled: bool = False

    def columns(self, roles: Sequence[str]) -> dict[str, str]:
        """Return the columns of the data by the task's columns, where the options name them."""
        given = {roles[0]: self.input_column, roles[-1]: self.target_column}
        return {role: name for role, name in given.items() if name is not None}


def data_options(
    input_column: str | None,
    target_column: str | None,
    prompt: tuple[str | None, bool, str | None],
    labels: str,
    unlabeled: bool = False,
) -> DataOptions:
    """Return the options of a command about its data. `prompt` is --prompt, --chat and --system."""
    return DataOptions(input_column, target_column, prompt_named(*prompt), labels, unlabeled)


def prompt_named(text: str | None, chat: bool, system: str | None) -> tasks.Prompt | None:
    """Return the prompt of the options --prompt, --chat and --system; None without any."""
    if text is None and not chat and system is None:
        return None
    return tasks.Prompt("{input}" if text is None else text, chat, system)


def prepare(
    model: str,
    data: str,
    options: DataOptions,
    *,
    task: str | None,
    examples: int | None,
    max_length: int | None,
    device: str,
    dtype: str,
    device_map: str | None = None,
) -> tuple[Loaded, tasks.Task, list[Example]]:
    """Load the model, the task and the examples of a command.

    Args:
        model: A folder, a Hub name, or "builtin".
        data: The examples, as in `read`.
        options: The options about the data. The targets of all rows may tell the labels.
        task: The kind of task; None for the model's own kind.
        examples: Return only that many rows, the first ones; None for all.
        max_length: Inputs are cut after that many tokens.
        device: The device, as in `load_model`.
        dtype: The dtype, as in `load_model`.
        device_map: How Accelerate spreads the model, in place of `device`.

    Returns:
        The model, its task, and the rows.

    Raises:
        InputError: As in `load_model`, `read` and `make_task`.
    """
    loaded = load_model(model, task=task, device=device, dtype=dtype, device_map=device_map)
    known = prompt_of(loaded, options.prompt, data)
    rows = read(data, loaded, replace(options, prompt=known))
    made = make_task(loaded, options.labels, rows, max_length, prompt=known)
    return loaded, made, rows[:examples]


def read(data: str, loaded: Loaded, options: DataOptions) -> list[Example]:
    """Read the examples of a model's task.

    Args:
        data: A file, a Hub name or "builtin:...", as in `read_examples`; or a column file of tokens and tags.
        loaded: The model.
        options: The options about the data. The tags of a column file must be among the labels.

    Returns:
        The rows, with the columns of the task.

    Raises:
        InputError: The examples cannot be read, or a column file comes without the column of its tags, or for a model whose
            task is not token-classification.
    """
    roles = loaded.task_class.columns
    if not _is_column_file(data, options):
        given = options.columns(roles)
        return read_for(loaded, data, prompt=options.prompt, columns=given, unlabeled=options.unlabeled)
    if "tags" not in roles:
        raise InputError(
            f"data: expected a model for {TokenClassification.name} with the column file {data!r}, got one for {loaded.task}"
        )
    if options.target_column is None:
        raise InputError(f"target-column: expected the column of the tags, as {data!r} is a column file, got none")
    names = class_names(loaded.model, task_labels(loaded, options.labels, []))
    return tagged_examples(data, options.target_column, options.input_column or "1", names)


def _is_column_file(data: str, options: DataOptions) -> bool:
    """Whether data are a column file: by its ending, or a file of an unknown ending with a column of tags."""
    path = Path(data)
    if path.suffix == COLUMN_FILE:
        return True
    return options.target_column is not None and path.is_file() and format_of(data) not in FORMATS


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


def alignment(value: str, device: str, engine: int = 1) -> int:
    """Return the multiple of FFN widths. auto: tiles of 64 for a GPU's matrix units, vectors of 16 floats on a CPU.

    Args:
        value: The option's value.
        device: The device.
        engine: The multiple that an engine needs.

    Raises:
        InputError: The value is no number, or no multiple of what the engine needs.
    """
    if value == "auto":
        return math.lcm(engine, preferred_alignment(device))
    multiple = whole_number(value)
    if not multiple:
        raise InputError(f"align: expected 'auto' or a positive number, got {shown(value)}")
    if multiple % engine:
        raise InputError(f"align: expected a multiple of {engine} with --for, got {multiple}")
    return multiple
