"""The YAML file of `secateur multitask`: the model, its tasks, and how to prune and train."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml

from secateur.data.examples import ClassName, Example, read_examples
from secateur.learned.multitask.encoder_tasks import KINDS, Classification, EncoderTask, Regression, Span
from secateur.learned.multitask.schedule import CubicSchedule
from secateur.learned.multitask.training import LEARNING_RATES
from secateur.learned.shared.trainer import trainer_arguments
from secateur.support.errors import InputError, first_line


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
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config: cannot read {str(path)!r}: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"config: {str(path)!r} is no YAML: {' '.join(str(error).split())}") from error
    settings = dict(_section("config", content, Config))
    tasks = settings.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise InputError(f"tasks: expected tasks by name, got {tasks!r}")
    settings["tasks"] = {str(name): TaskConfig(**_task_fields(name, task)) for name, task in tasks.items()}
    for name, section_type in (("pruning", PruningConfig), ("schedule", CubicSchedule)):
        settings[name] = section_type(**_section(name, settings.get(name, {}), section_type))
    for name in ("learning_rates", "training"):
        if not isinstance(settings.get(name, {}), dict):
            raise InputError(f"{name}: expected values by name, got {settings[name]!r}")
    for group, rate in settings.get("learning_rates", {}).items():
        if group not in LEARNING_RATES or not isinstance(rate, (int, float)) or isinstance(rate, bool):
            raise InputError(f"learning_rates: expected numbers for some of {', '.join(LEARNING_RATES)}, got {group}: {rate!r}")
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
        raise InputError(f"training.report_to: expected installed integrations, got {', '.join(sorted(missing))}")
    for name, count in (("save_steps", 4), ("logging_steps", 50)):
        if name not in given:
            setattr(arguments, name, max(1, arguments.max_steps // count))
    if "warmup_steps" not in given:
        arguments.warmup_steps = arguments.max_steps // 10
    return arguments


def _require_training_values(given: Mapping[str, Any]) -> None:
    """Raise InputError if a value for the Trainer has the wrong type, or a batch or accumulation is below 1."""
    from transformers import TrainingArguments

    known = {known_field.name: known_field for known_field in fields(TrainingArguments)}
    for name, value in given.items():
        if name in known:
            _require_type(f"training.{name}", known[name], value)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if given.get(name, 1) < 1:
            raise InputError(f"training.{name}: expected at least 1, got {given[name]}")


def _task_fields(name: Any, task: Any) -> dict[str, Any]:
    """Return the checked fields of a task's section, which may be the data alone."""
    section = dict(_section(f"tasks.{name}", {"data": task} if isinstance(task, str) else task, TaskConfig))
    if section.get("kind", "classification") not in KINDS:
        raise InputError(f"tasks.{name}.kind: expected one of {', '.join(KINDS)}, got {section['kind']!r}")
    examples = section.get("examples")
    if examples is not None and examples < 1:
        raise InputError(f"tasks.{name}.examples: expected at least 1, got {examples}")
    labels = section.get("labels")
    if labels is not None:
        if not isinstance(labels, list):
            raise InputError(f"tasks.{name}.labels: expected a list of names, got {labels!r}")
        section["labels"] = tuple(str(label) for label in labels)
    return section


# The Python types that a field's annotation allows.
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "bool": (bool,), "int": (int,), "float": (int, float), "str | None": (str, type(None)),
    "bool | None": (bool, type(None)), "int | None": (int, type(None)), "float | None": (int, float, type(None)),
}  # fmt: skip


def _section(where: str, content: Any, section_type: type) -> dict[str, Any]:
    """Check that a section has only known fields of the right types and lacks no required field; return its fields."""
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected values by name, got {content!r}")
    known = {known_field.name: known_field for known_field in fields(section_type)}
    for name, value in content.items():
        if name not in known:
            raise InputError(f"{where}: expected some of {', '.join(known)}, got {name!r}")
        _require_type(f"{where}.{name}", known[name], value)
    for name, known_field in known.items():
        if name not in content and known_field.default is MISSING and known_field.default_factory is MISSING:
            raise InputError(f"{where}: expected {name!r}, got {', '.join(map(repr, content)) or 'nothing'}")
    return content


def _require_type(where: str, known_field: Field[Any], value: Any) -> None:
    """Raise InputError if a value's type is not the field's; types that are not in `_TYPES` are not checked."""
    annotation = known_field.type.__name__ if isinstance(known_field.type, type) else str(known_field.type)
    allowed = _TYPES.get(annotation)
    if allowed is not None and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
        raise InputError(f"{where}: expected {annotation}, got {value!r}")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader that reads scalars as YAML 1.2 does: 3e-5 is a float without a point too; dates, yes and no are text.

    So a label can be a date, yes or no.
    """

    # By first character of a scalar: (tag, pattern) pairs.
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [resolver for resolver in resolvers if resolver[0].rpartition(":")[2] not in ("bool", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
