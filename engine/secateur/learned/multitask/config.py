"""The YAML file of `secateur multitask`: the model, its tasks, and how to prune and train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from secateur.data.examples import ClassName, Example, read_examples
from secateur.learned.multitask.encoder_tasks import KINDS, Classification, EncoderTask, Regression, Span
from secateur.learned.multitask.schedule import CubicSchedule
from secateur.learned.multitask.training import LEARNING_RATES
from secateur.support.errors import InputError
from secateur.support.fields import require_type, shown
from secateur.support.trainer import trainer_arguments
from secateur.support.yaml_files import read_yaml


@dataclass(frozen=True)
class TaskConfig:
    """A task of the YAML file.

    Args:
        data: Training examples: a file, a built-in name or a Hub name.
        eval: Evaluation examples, or None to leave the task out of the evaluation.
        kind: "classification", "regression" or "span".
        labels: The labels of a classification. By default those that occur in the data.
        metric: "accuracy" or "matthews", for a classification.
        pair: Whether the examples have a second text, "pair".
        examples: The number of training examples to take, from the first on. None takes all.
    """

    data: str
    eval: str | None = None
    kind: str = "classification"
    labels: tuple[str, ...] | None = None
    metric: str = "accuracy"
    pair: bool = False
    examples: int | None = None


@dataclass(frozen=True)
class PruningConfig:
    """The arguments of `MultitaskPruning`.

    Args:
        method: "magnitude" or "movement".
        granularity: "element" or "rank".
        scope: "global" or "local".
        density: The share of the linear layers' weights to keep.
        initial_scores: The folder of a trained multitask model of the same encoder and tasks. Its attribution scores are the
            initial movement scores.
    """

    method: str = "movement"
    granularity: str = "element"
    scope: str = "global"
    density: float = 0.1
    initial_scores: str | None = None


@dataclass(frozen=True)
class Config:
    """The whole YAML file.

    Args:
        model: The folder or Hub name of an encoder, or "builtin".
        tasks: The tasks by name.
        pruning: How to prune.
        schedule: How the density falls over training.
        learning_rates: Learning rates of "weights", "scores" and "sigma".
        training: Values for transformers.TrainingArguments.
        pooling: What a head reads, "mean" or "first".
        max_length: The largest number of pieces of an example.
    """

    model: str
    tasks: dict[str, TaskConfig]
    pruning: PruningConfig = field(default_factory=PruningConfig)
    schedule: CubicSchedule = field(default_factory=CubicSchedule)
    learning_rates: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    pooling: str = "mean"
    max_length: int = 128


def read_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """Read and check a config file.

    Args:
        path: The YAML file.

    Returns:
        The config, and the file's content as plain values.

    Raises:
        InputError: The file cannot be read, is not YAML, or has a field that is unknown, missing or of the wrong type.
    """
    content = read_yaml(path)
    settings = dict(_section("config", content, Config))
    tasks = settings.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise InputError(f"tasks: expected tasks by name, got {shown(tasks)}")
    settings["tasks"] = {str(name): TaskConfig(**_task_fields(name, task)) for name, task in tasks.items()}
    for name, section_type in (("pruning", PruningConfig), ("schedule", CubicSchedule)):
        settings[name] = section_type(**_section(name, settings.get(name, {}), section_type))
    for name in ("learning_rates", "training"):
        if not isinstance(settings.get(name, {}), dict):
            raise InputError(f"{name}: expected values by name, got {shown(settings[name])}")
    for group, rate in settings.get("learning_rates", {}).items():
        if group not in LEARNING_RATES or not isinstance(rate, (int, float)) or isinstance(rate, bool):
            given = f"{shown(group)}: {shown(rate)}"
            raise InputError(f"learning_rates: expected numbers for some of {', '.join(LEARNING_RATES)}, got {given}")
        if not 0 <= rate <= _LARGEST_RATE:
            raise InputError(f"learning_rates: expected a number from 0 to {_LARGEST_RATE:g} for {group}, got {shown(rate)}")
    return Config(**settings), content


def load_task(name: str, section: TaskConfig) -> tuple[EncoderTask, list[Example], list[Example]]:
    """Read a task's examples and build the task.

    Args:
        name: The task's name, for error messages.
        section: The task's section of the config.

    Returns:
        The task, its training examples and its evaluation examples (empty without `eval`).

    Raises:
        InputError: As in `read_examples`, or the labels and the metric do not fit each other.
    """
    columns = KINDS[section.kind].columns
    columns = ("input", "pair", "target") if section.pair and section.kind != Span.kind else columns
    train = read_examples(section.data, columns, limit=section.examples)
    test = [] if section.eval is None else read_examples(section.eval, columns)
    task: EncoderTask
    if section.kind == Classification.kind:
        train_labels = sorted({str(row["target"]) for row in train})
        try:
            task = Classification(section.labels or tuple(train_labels), section.metric)  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        # Without `labels`, the label names are the targets as text; files often have class numbers.
        for row in (*train, *test):
            row["target"] = str(row["target"]) if section.labels is None else _numbered(row["target"], section.labels)
    else:
        task = Regression() if section.kind == Regression.kind else Span()
    return task, train, test


def _numbered(target: Any, labels: Sequence[str]) -> Any:
    """The target, as a number if it has a name in its data set and `labels`, in the order of the numbers, give other names."""
    renamed = isinstance(target, ClassName) and not set(target.names) & set(labels)
    return target.number if renamed else target


def training_arguments(config: Config, sizes: Mapping[str, int], folder: Path, device: str) -> Any:
    """Build the Trainer's arguments from secateur's defaults and the config's values.

    Unless the config says otherwise, there are 4 checkpoints and 50 log entries, and a tenth of the steps is warm-up.

    Args:
        config: The config.
        sizes: The number of training examples of each task. An epoch is a pass over all of them.
        folder: The output directory, where checkpoints go.
        device: The device's name; "cpu" makes the Trainer use the CPU.

    Returns:
        The arguments, with max_steps set.

    Raises:
        InputError: The Trainer refuses a value, the values allow no step, ask for evaluation during training, or name a
            reporting integration that is not installed.
    """
    from transformers.integrations import get_available_reporting_integrations

    given = dict(config.training)
    _require_training_values(given)
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 32, "learning_rate": LEARNING_RATES["weights"], "lr_scheduler_type": "linear",
    }  # fmt: skip
    arguments = trainer_arguments(folder, device, {**defaults, **given})
    if arguments.max_steps < 1:
        if "num_train_epochs" not in given:
            raise InputError("training: expected max_steps or num_train_epochs, got neither")
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        arguments.max_steps = math.ceil(arguments.num_train_epochs * sum(sizes.values()) / batch)
    if arguments.max_steps < 1:
        raise InputError(f"training.num_train_epochs: expected more than 0, got {arguments.num_train_epochs}")
    if arguments.eval_strategy != "no":
        strategy = arguments.eval_strategy.value
        raise InputError(f"training.eval_strategy: expected 'no' (tasks are evaluated at the end), got {strategy!r}")
    missing = set(arguments.report_to) - set(get_available_reporting_integrations())
    if missing:
        raise InputError(f"training.report_to: expected installed integrations, got {', '.join(sorted(map(str, missing)))}")
    for name, count in (("save_steps", 4), ("logging_steps", 50)):
        if name not in given:
            setattr(arguments, name, max(1, arguments.max_steps // count))
    if "warmup_steps" not in given:
        arguments.warmup_steps = arguments.max_steps // 10
    return arguments


def _require_training_values(given: Mapping[str, Any]) -> None:
    """Raise InputError if a value for the Trainer has the wrong type or is out of its range."""
    from transformers import TrainingArguments

    known = {known_field.name: known_field for known_field in fields(TrainingArguments)}
    for name, value in given.items():
        if name in known:
            _require_type(f"training.{name}", known[name], value)
    for name, (low, high) in _RANGES.items():
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, (int, float)):
            raise InputError(f"training.{name}: expected a number, got {shown(value)}")
        if not value >= low:
            raise InputError(f"training.{name}: expected at least {low:g}, got {shown(value)}")
        if value > high:
            raise InputError(f"training.{name}: expected at most {high:g}, got {shown(value)}")


_LARGEST_RATE, _MOST_STEPS, _MOST_SEED = 1e6, 1e9, 2**32 - 1
# The types of the Trainer's arguments, by the text of their annotation. Arguments of other types are left to the Trainer.
_TYPES: dict[str, Any] = {
    "str": str, "bool": bool, "int": int, "float": float, "str | None": str | None, "bool | None": bool | None,
    "int | None": int | None, "float | None": float | None,
}  # fmt: skip
# The ranges of the Trainer's arguments. The Trainer itself takes any number.
_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0, _LARGEST_RATE), "weight_decay": (0, _LARGEST_RATE), "max_grad_norm": (0, _LARGEST_RATE),
    "max_steps": (-_MOST_STEPS, _MOST_STEPS), "num_train_epochs": (-_MOST_STEPS, _MOST_STEPS), "seed": (0, _MOST_SEED),
    "data_seed": (0, _MOST_SEED), "per_device_train_batch_size": (1, _MOST_STEPS),
    "gradient_accumulation_steps": (1, _MOST_STEPS), "dataloader_num_workers": (0, 1024), "save_total_limit": (1, _MOST_STEPS),
    "adam_beta1": (0, 1), "adam_beta2": (0, 1), "adam_epsilon": (0, 1), "label_smoothing_factor": (0, 1),
    "warmup_steps": (0, _MOST_STEPS), "warmup_ratio": (0, 1), "logging_steps": (0, _MOST_STEPS), "save_steps": (0, _MOST_STEPS),
}  # fmt: skip


def _task_fields(name: Any, task: Any) -> dict[str, Any]:
    """Return the checked fields of a task's section, which may be the data alone."""
    section = dict(_section(f"tasks.{name}", {"data": task} if isinstance(task, str) else task, TaskConfig))
    if section.get("kind", "classification") not in KINDS:
        raise InputError(f"tasks.{name}.kind: expected one of {', '.join(KINDS)}, got {shown(section['kind'])}")
    examples = section.get("examples")
    if examples is not None and examples < 1:
        raise InputError(f"tasks.{name}.examples: expected at least 1, got {examples}")
    labels = section.get("labels")
    if labels is not None:
        if not isinstance(labels, list):
            raise InputError(f"tasks.{name}.labels: expected a list of names, got {shown(labels)}")
        section["labels"] = tuple(str(label) for label in labels)
    return section


def _section(where: str, content: Any, section_type: type) -> dict[str, Any]:
    """Check that a section has only known fields of the right types and lacks no required field; return its fields."""
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected values by name, got {shown(content)}")
    known = {known_field.name: known_field for known_field in fields(section_type)}
    for name, value in content.items():
        if name not in known:
            raise InputError(f"{where}: expected some of {', '.join(known)}, got {shown(name)}")
        _require_type(f"{where}.{name}", known[name], value)
    for name, known_field in known.items():
        if name not in content and known_field.default is MISSING and known_field.default_factory is MISSING:
            raise InputError(f"{where}: expected {name!r}, got {', '.join(map(shown, content)) or 'nothing'}")
    return content


def _require_type(where: str, known_field: Field[Any], value: Any) -> None:
    """Raise InputError if a value's type is not the field's; types that are not in `_TYPES` are not checked."""
    annotation = known_field.type.__name__ if isinstance(known_field.type, type) else str(known_field.type)
    require_type(where, _TYPES.get(annotation, Any), value)
