"""From a command's arguments to a model, a task, examples and a criterion."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from secateur import tasks
from secateur.attribution.criteria import Criterion, criterion_named
from secateur.cli.shared import checkpoints
from secateur.cli.shared.tagged import tagged_examples
from secateur.data.examples import Example, read_examples
from secateur.flow.choose import RECOVERIES
from secateur.pruning import save as export
from secateur.recovery import Method
from secateur.support.errors import InputError, first_line
from secateur.tasks.fitting import read_tokenizer, require_rows
from secateur.tasks.sequence import class_names

TASK_FILE = "secateur.json"
COLUMN_FILE = ".conll"
TASKS: dict[str, type[tasks.Task]] = {
    "text-to-text": tasks.TextToText,
    "sequence-classification": tasks.SequenceClassification,
    "token-classification": tasks.TokenClassification,
    "causal-lm": tasks.CausalLM,
    "image-classification": tasks.ImageClassification,
}
_ENDINGS = {
    "ForConditionalGeneration": "text-to-text",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "causal-lm",
    "ForImageClassification": "image-classification",
}
_MOST_LABELS = 32
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Of a column file: that of the tags, where the data is such a file, and that of the tokens.
Columns = tuple[str | None, str]


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer (of images: processor), the dtype it is stored in, and the name of its task."""

    model: nn.Module
    tokenizer: Any
    stored: torch.dtype
    task: str
    labels: list[str] | None

    @property
    def device(self) -> str:
        return next(self.model.parameters()).device.type


def load_model(name: str, *, task: str | None, device: str, dtype: str, device_map: str | None = None) -> Loaded:
    """A model by folder, Hub name or "builtin", in eval mode.

    dtype "auto" is the stored one on an accelerator and float32 on a CPU, where half precision is slow and coarse.
    device_map: how Accelerate spreads it, in place of `device`.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # Loading takes less than reading of it; our own bars show what takes time.
    place = device_named(device)
    path, config = _described(name)
    kind, stored = _kind(path, config, task), _stored_dtype(config)
    options: dict[str, Any] = {"dtype": _dtype(dtype, stored, place)}
    reader = "AutoImageProcessor" if kind == "image-classification" else "AutoTokenizer"
    if device_map is not None:
        options["device_map"] = _device_map(device_map, device, config)
    try:
        model = _load(path, config, TASKS[kind].auto_class, options)
        tokenizer = read_tokenizer(path, reader)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"model: {name!r} cannot be loaded as {TASKS[kind].auto_class}: {first_line(error)}") from error
    require_rows(model, tokenizer)
    return Loaded((model if device_map else model.to(place)).eval(), tokenizer, stored, kind, _remembered(path).get("labels"))


def meta_model(name: str, *, task: str | None, dtype: str = "auto") -> nn.Module:
    """The model of a folder or Hub name on the meta device, in eval mode: of its config alone, without a weight or a tokenizer.
    dtype "auto" is the stored one."""
    import transformers

    path, config = _described(name)
    kind, stored = _kind(path, config, task), _stored_dtype(config)
    computed = stored if dtype == "auto" else _dtype(dtype, stored, torch.device("meta"))
    pruned: Any = export.class_of(path) if hasattr(config, "secateur") and Path(path).is_dir() else None
    build: Any = pruned._from_config if pruned else getattr(transformers, TASKS[kind].auto_class).from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build(config, dtype=computed)
    except ValueError as error:
        raise InputError(f"model: {name!r} cannot be built as {TASKS[kind].auto_class}: {first_line(error)}") from error
    return model.eval()


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


def make_task(loaded: Loaded, labels: str, rows: Sequence[Example], max_length: int | None) -> tasks.Task:
    """The task of a loaded model. labels: "auto", "open", or names between commas."""
    cls = TASKS[loaded.task]
    return cls(loaded.tokenizer, labels=_labels(loaded, labels, rows), max_length=max_length)


def read(
    data: str, loaded: Loaded, columns: Columns = (None, "1"), labels: str = "auto", *, unlabeled: bool = False
) -> list[Example]:
    """Examples with the columns of a model's task, or the first of them alone; "builtin:..." as in `read_examples`. columns:
    where they are in a column file, whose tags are among the labels (those of `make_task`)."""
    column, token = columns
    if column is None:
        if Path(data).suffix == COLUMN_FILE:
            raise InputError(f"column: expected the column of the tags, as {data!r} is a column file, got none")
        names = TASKS[loaded.task].columns
        return read_examples(data, names[:1] if unlabeled else names)
    if loaded.task != "token-classification":
        raise InputError(f"column: expected a model for token-classification, got one for {loaded.task}")
    return tagged_examples(data, column, token, class_names(loaded.model, _labels(loaded, labels, [])))


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
    """Return the criterion, with the fields that options set.

    With `unlabeled`, it scores for all candidate labels. Their signed scores would cancel, so they become absolute, unless an
    option says otherwise.

    Raises:
        InputError: The criterion is unknown, or lacks a setting that an option sets.
    """
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


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads, if it is given."""
    if threads is not None:
        torch.set_num_threads(threads)


def remember(loaded: Loaded, task: tasks.Task) -> str:
    """Return the file in a pruned folder that tells later commands its task."""
    return json.dumps({"task": loaded.task, "labels": task.labels}, indent=1) + "\n"


def _labels(loaded: Loaded, labels: str, rows: Sequence[Example]) -> list[str] | None:
    if labels == "open":
        return None
    if labels != "auto":
        return [label.strip() for label in labels.split(",")]
    if loaded.labels is not None or loaded.task not in ("text-to-text", "causal-lm"):
        return loaded.labels
    if not all("target" in row for row in rows):
        raise InputError("labels: expected the candidate labels between commas where examples have no targets, got 'auto'")
    distinct = list(dict.fromkeys(row["target"] for row in rows if isinstance(row["target"], str)))
    closed = 2 <= len(distinct) <= _MOST_LABELS and len(distinct) * 2 <= len(rows)
    if not closed and len(distinct) == 1 and len(rows) > 1:
        raise InputError(f"data: expected at least two different targets, got {distinct[0]!r} in all {len(rows)} rows")
    return sorted(distinct) if closed else None


def _load(path: str, config: Any, auto_class: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    if hasattr(config, "secateur") and Path(path).is_dir():
        return export.load(path, **options)
    model: nn.Module = getattr(transformers, auto_class).from_pretrained(path, **options)
    return model


def _described(name: str) -> tuple[str, Any]:
    """Where a model is, and its config."""
    from transformers import AutoConfig

    checkpoints.require_no_gguf(name)
    path = _folder(name)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise checkpoints.unreachable(name, error) from error
    checkpoints.require_plain(name, config)
    return path, config


def _kind(path: str, config: Any, task: str | None) -> str:
    """The name of the task: as asked for, as the folder remembers it, or as the config tells it."""
    kind = task or _remembered(path).get("task") or _task_of(config)
    if kind not in TASKS:
        raise InputError(f"task: expected one of {', '.join(TASKS)}, got {kind!r}")
    checkpoints.require_architecture(path, config, kind, TASKS)
    return str(kind)


def _folder(name: str) -> str:
    if name == "builtin":
        from secateur.data.builtin import MODEL

        return str(MODEL)
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
        raise InputError(f"model: no such model folder: {name!r}")
    return name


def _remembered(folder: str) -> dict[str, Any]:
    path = Path(folder) / TASK_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _task_of(config: Any) -> str:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    for ending, task in _ENDINGS.items():
        if architecture.endswith(ending):
            return task
    raise InputError(
        f"task: expected one of {', '.join(TASKS)}, got none, and the model ({architecture or 'no architecture'}) does not tell"
    )


def _stored_dtype(config: Any) -> torch.dtype:
    stored = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    return stored or torch.float32


def _dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if name not in ("float32", "float16", "bfloat16"):
        raise InputError(f"dtype: expected auto, float32, float16 or bfloat16, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device_map(name: str, device: str, config: Any) -> str:
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


def device_named(name: str) -> torch.device:
    """Return a device by name; "auto" is CUDA where it is available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} cannot be used: {first_line(error)}") from error


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
        return 16 if device == "cpu" else 64
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"align: expected 'auto' or a positive number, got {value!r}")
    return int(value)
