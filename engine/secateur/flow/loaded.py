"""Models by folder, Hub name or "builtin", with their tokenizers and tasks."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import RepositoryNotFoundError
from torch import nn

from secateur import tasks
from secateur.data.columns import Columns, require_columns_given
from secateur.data.examples import Example, Examples, read_examples
from secateur.flow import checkpoints
from secateur.model.loading import load_complete
from secateur.model.recipe import require_recipe
from secateur.pruning import save
from secateur.support.compat import auto_architectures, model_from_config, without_own_code
from secateur.support.errors import InputError, first_line, reading
from secateur.support.fields import checked_fields, read_object, require_type, shown
from secateur.support.hub import model_place, with_whole_folder
from secateur.tasks.fitting import read_tokenizer
from secateur.tasks.prompt import as_prompt, columns_with
from secateur.tasks.task_file import TASK_FILE, TASKS, name_of

logger = logging.getLogger("secateur")
_MOST_LABELS = 32
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, its stored dtype and its task.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer, or its image processor.
        stored: The dtype that the folder stores it in.
        task: The name of its task, a key of `TASKS`; empty for a task of another class.
        labels: The candidate labels that the folder remembers, if it does.
        prompt: The prompt that the folder remembers, if it does.
    """

    model: nn.Module
    tokenizer: Any
    stored: torch.dtype
    task: str
    labels: list[str] | None
    prompt: tasks.Prompt | None = None

    @property
    def device(self) -> str:
        """The type of the model's device, such as "cpu"."""
        return next(self.model.parameters()).device.type

    @property
    def task_class(self) -> type[tasks.Task]:
        """The class of its task."""
        return TASKS[self.task]


def load_model(name: str, *, task: str | None, device: str, dtype: str, device_map: str | None = None) -> Loaded:
    """Load a model by folder, Hub name or "builtin", in eval mode.

    Args:
        name: The folder, the Hub name, or "builtin".
        task: The name of the task, a key of `TASKS`. By default the task that the folder remembers, or the config tells.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "float16", "bfloat16", or "auto": the stored dtype on an accelerator, and float32 on a CPU, where half
            precision is slow and coarse.
        device_map: How Accelerate spreads the model, in place of `device`.

    Returns:
        The model with its tokenizer, its stored dtype and its task.

    Raises:
        InputError: There is no such model, it cannot be loaded for the task, or an argument has an unknown value.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # Loading takes little time, and our own bars show what takes time.
    place = device_named(device)
    path, config = described(name)
    kind, stored = _kind(path, config, task), _stored_dtype(config)
    options: dict[str, Any] = {"dtype": _dtype(dtype, stored, place)}
    if device_map is not None:
        options["device_map"] = _device_map(device_map, device, config)
    with reading("model", name, f"cannot be loaded as {TASKS[kind].auto_class}", typed=False, also=checkpoints.FOREIGN):
        model = _load(path, config, TASKS[kind].auto_class, options)
        tokenizer = read_tokenizer(path, TASKS[kind].reader_class)
    TASKS[kind].require_reader(model, tokenizer)
    known = _remembered(path)
    logger.info("%s: loaded for %s in %s on %s", name, kind, options["dtype"], place)
    model = (model if device_map else model.to(place)).eval()
    return Loaded(model, tokenizer, stored, kind, known.get("labels"), known.get("prompt"))


def meta_model(name: str, *, task: str | None, dtype: str = "auto") -> nn.Module:
    """Build the model of a folder or Hub name on the meta device, in eval mode, from its config alone.

    Args:
        name: The folder, the Hub name, or "builtin". It needs neither weights nor a tokenizer.
        task: As in `load_model`.
        dtype: As in `load_model`, but "auto" is the stored dtype.

    Returns:
        The model without weights.

    Raises:
        InputError: As `load_model` does.
    """
    import transformers

    path, config = described(name)
    kind, stored = _kind(path, config, task), _stored_dtype(config)
    computed = stored if dtype == "auto" else _dtype(dtype, stored, torch.device("meta"))
    pruned: Any = save.class_of(path) if hasattr(config, "secateur") and Path(path).is_dir() else None
    stock: Any = getattr(transformers, TASKS[kind].auto_class)
    problem = f"cannot be built as {TASKS[kind].auto_class}"
    with reading("model", name, problem, typed=False, also=checkpoints.FOREIGN), torch.device("meta"):
        model: nn.Module
        if pruned:
            model = model_from_config(pruned, config, computed)
        else:
            model = without_own_code(stock.from_config, config, dtype=computed)
    return model.eval()


def loaded_from(model: nn.Module, task: tasks.Task, tokenizer: Any) -> Loaded:
    """Return a model that the caller has loaded as `Loaded`. The model's dtype counts as the stored dtype."""
    stored = next(model.parameters()).dtype
    return Loaded(model, task.reader if tokenizer is None else tokenizer, stored, name_of(task), task.labels)


def make_task(
    loaded: Loaded,
    labels: str | Sequence[str],
    rows: Sequence[Example],
    max_length: int | None,
    *,
    prompt: tasks.Prompt | None = None,
    columns: Columns | None = None,
) -> tasks.Task:
    """Make the task of a loaded model.

    Args:
        loaded: The model.
        labels: The candidate labels as a sequence; in one text: between commas, a JSON list, or the path of a file (.txt with
            a label a line, .json with a list); "open" for open targets; "auto" for the labels that the folder remembers, or
            the examples tell. Spaces around the labels of a text or a .txt file are part of them for causal language models
            alone, and those of JSON always.
        rows: The examples that may tell the labels.
        max_length: Inputs are cut after that many tokens.
        prompt: The text around each input; by default the one that the folder remembers.
        columns: The columns of the data by the task's columns.

    Returns:
        The task.

    Raises:
        InputError: The examples do not tell the labels, the text or file of the labels cannot be read, or the task takes no
            prompt.
    """
    task_class: Any = loaded.task_class
    known, prompt = task_labels(loaded, labels, rows), prompt or loaded.prompt
    options: dict[str, Any] = {"labels": known, "max_length": max_length, "columns": columns}
    if prompt is not None:
        _require_prompts(loaded)
        options["prompt"] = prompt
    task: tasks.Task = task_class(loaded.tokenizer, **options)
    return task


def read_for(
    loaded: Loaded,
    examples: Examples,
    *,
    prompt: tasks.Prompt | None = None,
    columns: Columns | None = None,
    unlabeled: bool = False,
) -> list[Example]:
    """Read examples for a loaded model whose task is not made yet, because the examples may tell the labels.

    Args:
        loaded: The model.
        examples: The examples.
        prompt: As in `make_task`.
        columns: As in `make_task`.
        unlabeled: Read the inputs only.

    Raises:
        InputError: As `read_examples`.
    """
    task_class = loaded.task_class
    named = require_columns_given(columns_with(prompt or loaded.prompt, columns), task_class.columns)
    roles = task_class.columns[:1] if unlabeled else task_class.columns
    named = {role: names for role, names in named.items() if role in roles}
    return read_examples(examples, roles, names=named, pairs=task_class.takes_pairs)


def prompt_of(loaded: Loaded, prompt: str | tasks.Prompt | None, examples: object) -> tasks.Prompt | None:
    """Return the prompt for a model: the given one, the one that its folder remembers, or that of a built-in task's data."""
    known = as_prompt(prompt) or loaded.prompt
    if known is None and isinstance(examples, str) and examples.startswith("builtin:") and loaded.task == tasks.TextToText.name:
        from secateur.data.builtin import prompt as builtin_prompt

        return tasks.Prompt(builtin_prompt(examples.removeprefix("builtin:")))
    return known


def _require_prompts(loaded: Loaded) -> None:
    """Raise InputError for a task whose inputs take no text around them."""
    if "prompt" not in inspect.signature(loaded.task_class).parameters:
        raise InputError(f"prompt: expected none for {loaded.task}, whose inputs take no text around them, got one")


def task_labels(loaded: Loaded, labels: str | Sequence[str], rows: Sequence[Example]) -> list[str] | None:
    """Return the candidate labels; None for open targets. The arguments are those of `make_task`."""
    if not isinstance(labels, str):
        if not isinstance(labels, Sequence) or not all(isinstance(label, str) for label in labels):
            raise InputError(f"labels: expected texts, or a text with commas between the labels, got {labels!r}")
        return list(labels)
    if labels == "open" and loaded.task_class.labels_from_model:
        raise InputError(f"labels: expected auto or names for {loaded.task}, whose model names its labels, got 'open'")
    if labels == "open":
        return None
    if labels != "auto":
        return _written_labels(labels, spaces=loaded.task_class.spaces_in_labels)
    if loaded.labels is not None or loaded.task_class.labels_from_model:
        return loaded.labels
    if not all("target" in row for row in rows):
        raise InputError("labels: expected the candidate labels between commas where examples have no targets, got 'auto'")
    distinct = list(dict.fromkeys(row["target"] for row in rows if isinstance(row["target"], str)))
    closed = 2 <= len(distinct) <= _MOST_LABELS and len(distinct) * 2 <= len(rows)
    if not closed and len(distinct) == 1 and len(rows) > 1:
        raise InputError(f"data: expected at least two different targets, got {distinct[0]!r} in all {len(rows)} rows")
    return sorted(distinct) if closed else None


def _written_labels(text: str, *, spaces: bool) -> list[str]:
    """The labels of a JSON list, of a file, or between commas. `spaces`: whether the spaces around them are part of them."""
    if text.strip().startswith("[") and text.strip().endswith("]"):
        return _json_labels(text, text)
    path = Path(text)
    if path.suffix in (".txt", ".json") and ("," not in text or os.path.isfile(text)):
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"labels: cannot read {text!r}: {first_line(error)}") from error
        if path.suffix == ".json":
            return _json_labels(content, text)
        labels = content.removesuffix("\n").split("\n")
    else:
        labels = text.split(",")
        if spaces and len({label[:1].isspace() for label in labels}) > 1:
            raise InputError(
                f"labels: expected a space before each label or before none, as spaces count for a causal-lm, got {text!r}; "
                'a JSON list says it exactly: ["yes", " no"]'
            )
    labels = labels if spaces else [label.strip() for label in labels]
    if not all(labels):
        raise InputError(f"labels: expected no empty label, got one in {text!r}")
    return labels


def _json_labels(content: str, where: str) -> list[str]:
    """The labels of a JSON list. Raises InputError for other content; `where` is the text or the file."""
    try:
        labels = json.loads(content)
    except ValueError as error:
        raise InputError(f"labels: expected a JSON list of texts, got {where!r}: {first_line(error)}") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
        raise InputError(f"labels: expected a JSON list of texts, got {where!r}")
    return labels


def device_named(name: str) -> torch.device:
    """Return a device by name; "auto" is CUDA where it is available.

    Raises:
        InputError: The device cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        place = torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} cannot be used: {first_line(error)}") from error
    if place.type == "meta":
        raise InputError("device: expected one that computes, got 'meta'")
    return place


def _load(path: str, config: Any, auto_class: str, options: dict[str, Any]) -> nn.Module:
    """The model of a folder or Hub name, pruned or not."""
    import transformers

    if hasattr(config, "secateur") and Path(path).is_dir():
        return save.load(path, **options)
    return load_complete(getattr(transformers, auto_class), path, **options)


def described(name: str) -> tuple[str, Any]:
    """Return the folder or Hub name of a model, and its config.

    Args:
        name: The folder, the Hub name, or "builtin".

    Raises:
        InputError: The model cannot be loaded or pruned.
    """
    from transformers import AutoConfig

    checkpoints.require_no_gguf(name)
    path = _folder(name)
    checkpoints.require_bounded(path)
    try:
        config = without_own_code(AutoConfig.from_pretrained, path)
    except InputError:
        raise
    except checkpoints.FOREIGN as error:
        raise checkpoints.unreachable(name, error) from error
    if hasattr(config, "secateur"):
        with reading("model", path, "holds a damaged config.secateur"):
            require_recipe(config.secateur)
    if not Path(path).is_dir():
        try:
            path = with_whole_folder(path, TASK_FILE, needed=hasattr(config, "secateur"))
        except checkpoints.FOREIGN as error:
            raise checkpoints.unreachable(name, error) from error
    checkpoints.require_plain(name, config)
    checkpoints.require_no_own_code(name, config)
    return path, config


def _kind(path: str, config: Any, task: str | None) -> str:
    """The name of the task: the one asked for, or the one that the folder remembers, or the one that the config tells."""
    kind = task or _remembered(path).get("task") or _task_of(config)
    if kind not in TASKS:
        raise InputError(f"task: expected one of {', '.join(TASKS)}, got {kind!r}")
    checkpoints.require_architecture(path, config, kind, TASKS)
    return str(kind)


def _folder(name: str) -> str:
    """Where to load a model from: its folder, or its name on the Hub. Raises InputError if it can be neither."""
    if name == "builtin":
        from secateur.data.builtin import MODEL

        return str(MODEL)
    if Path(name).is_dir():
        return name
    if Path(name).is_file():
        raise InputError(f"model: expected a model folder or a name on the Hub, got the file {name!r}")
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise InputError(f"model: no such model folder: {name!r}")
    try:
        return model_place(name)
    except RepositoryNotFoundError as error:
        raise checkpoints.unreachable(name, error) from error


def _remembered(folder: str) -> dict[str, Any]:
    """The content of the folder's `TASK_FILE`, empty without one."""
    path = Path(folder) / TASK_FILE
    if not path.is_file():
        return {}
    with reading("model", path, "is not the description of a task"):
        remembered = read_object(path)
        require_type("task", Literal[tuple(TASKS)] | None, remembered.get("task"))
        require_type("labels", list[str] | None, remembered.get("labels"))
        if remembered.get("prompt") is not None:
            remembered["prompt"] = tasks.Prompt(**checked_fields("prompt", remembered["prompt"], tasks.Prompt))
    return remembered


def _task_of(config: Any) -> str:
    """The name of the task that the config's architecture tells."""
    architecture = checkpoints.architecture_of(config)
    for name, task_class in TASKS.items():
        if architecture in auto_architectures(task_class.auto_class):
            return name
    raise InputError(
        f"task: expected one of {', '.join(TASKS)}, got none, and the model ({architecture or 'no architecture'}) does not tell"
    )


def _stored_dtype(config: Any) -> torch.dtype:
    """The dtype of the config, float32 without one."""
    stored = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, stored)
    if stored is not None and not (isinstance(stored, torch.dtype) and stored.is_floating_point):
        raise InputError(f"model: expected the name of a floating-point dtype in the config, got {shown(stored)}")
    return stored or torch.float32


def _dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in, by its name."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if name not in ("float32", "float16", "bfloat16"):
        raise InputError(f"dtype: expected auto, float32, float16 or bfloat16, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device_map(name: str, device: str, config: Any) -> str:
    """The device map, checked."""
    from transformers.utils import is_accelerate_available

    if name not in _DEVICE_MAPS:
        raise InputError(f"device-map: expected one of {', '.join(_DEVICE_MAPS)}, got {name!r}")
    if device != "auto":
        raise InputError(f"device-map: expected it alone, got it with device {device!r}")
    if hasattr(config, "secateur"):
        raise InputError("device-map: expected a dense model, got a pruned one")
    if not is_accelerate_available():
        raise InputError("device-map: expected the package accelerate, got none: pip install 'secateur[sharded]'")
    return name
