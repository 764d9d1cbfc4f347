"""The YAML file of `secateur multitask`: what to prune, on which tasks, how."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml

from secateur.data.examples import Example, read_examples
from secateur.learned.multitask.encoder_tasks import KINDS, Classification, EncoderTask, Regression, Span
from secateur.learned.multitask.schedule import CubicSchedule
from secateur.learned.multitask.training import LEARNING_RATES
from secateur.learned.shared.trainer import trainer_arguments
from secateur.support.errors import InputError, first_line


@dataclass(frozen=True)
class TaskConfig:
    """data, eval: files, built-in names or Hub names. labels: of a classification; those of the data by default. pair: the
    examples have a second text, "pair". examples: take the first that many of the data."""

    data: str
    eval: str | None = None
    kind: str = "classification"
    labels: tuple[str, ...] | None = None
    metric: str = "accuracy"
    pair: bool = False
    examples: int | None = None


@dataclass(frozen=True)
class PruningConfig:
    """As `MultitaskPruning` takes them. initial_scores: the folder of a trained multitask model of the same encoder and tasks,
    from whose attribution the scores of movement start."""

    method: str = "movement"
    granularity: str = "element"
    scope: str = "global"
    density: float = 0.1
    initial_scores: str | None = None


@dataclass(frozen=True)
class Config:
    """model: an encoder's folder or Hub name, or "builtin". training: arguments of transformers.TrainingArguments."""

    model: str
    tasks: dict[str, TaskConfig]
    pruning: PruningConfig = field(default_factory=PruningConfig)
    schedule: CubicSchedule = field(default_factory=CubicSchedule)
    learning_rates: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    pooling: str = "mean"
    max_length: int = 128


def read_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """The checked config, and what the file says. Raises InputError: no such file, no YAML, a field that is unknown, missing or
    of the wrong kind."""
    try:
        said = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config: cannot read {str(path)!r}: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"config: {str(path)!r} is no YAML: {' '.join(str(error).split())}") from error
    top = dict(_section("config", said, Config))
    tasks = top.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise InputError(f"tasks: expected tasks by name, got {tasks!r}")
    top["tasks"] = {str(name): TaskConfig(**_task_fields(name, about)) for name, about in tasks.items()}
    for name, kind in (("pruning", PruningConfig), ("schedule", CubicSchedule)):
        top[name] = kind(**_section(name, top.get(name, {}), kind))
    for name in ("learning_rates", "training"):
        if not isinstance(top.get(name, {}), dict):
            raise InputError(f"{name}: expected values by name, got {top[name]!r}")
    for group, rate in top.get("learning_rates", {}).items():
        if group not in LEARNING_RATES or not isinstance(rate, (int, float)) or isinstance(rate, bool):
            raise InputError(f"learning_rates: expected numbers for some of {', '.join(LEARNING_RATES)}, got {group}: {rate!r}")
    return Config(**top), said


def load_task(name: str, about: TaskConfig) -> tuple[EncoderTask, list[Example], list[Example]]:
    """A task with its training and evaluation examples (none without `eval`). Raises InputError as `read_examples`, and for
    labels and metrics that do not go together."""
    columns = KINDS[about.kind].columns
    columns = ("input", "pair", "target") if about.pair and about.kind != Span.kind else columns
    train = read_examples(about.data, columns, limit=about.examples)
    test = [] if about.eval is None else read_examples(about.eval, columns)
    task: EncoderTask
    if about.kind == Classification.kind:
        found = sorted({str(row["target"]) for row in train})
        try:
            task = Classification(about.labels or tuple(found), about.metric)  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        # Files often have class numbers where labels are names.
        for row in (*train, *test):
            row["target"] = str(row["target"]) if about.labels is None else row["target"]
    else:
        task = Regression() if about.kind == Regression.kind else Span()
    return task, train, test


def training_arguments(config: Config, sizes: Mapping[str, int], folder: Path, device: str) -> Any:
    """The Trainer's arguments: the config's over secateur's defaults. sizes: training examples by task, which epochs are
    counted over. Raises InputError for those that the Trainer refuses, and where they make no step."""
    from transformers import TrainingArguments
    from transformers.integrations import get_available_reporting_integrations

    given = dict(config.training)
    known = {each.name: each for each in fields(TrainingArguments)}
    for name, value in given.items():
        if name in known:
            _require_kind(f"training.{name}", known[name], value)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if given.get(name, 1) < 1:
            raise InputError(f"training.{name}: expected at least 1, got {given[name]}")
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
        raise InputError(f"training.report_to: expected what is installed, got {', '.join(sorted(missing))}")
    for name, count, share in (("save_steps", 4, arguments.max_steps), ("logging_steps", 50, arguments.max_steps)):
        if name not in given:
            setattr(arguments, name, max(1, share // count))
    if "warmup_steps" not in given:
        arguments.warmup_steps = arguments.max_steps // 10
    return arguments


def _task_fields(name: Any, about: Any) -> dict[str, Any]:
    found = dict(_section(f"tasks.{name}", {"data": about} if isinstance(about, str) else about, TaskConfig))
    if found.get("kind", "classification") not in KINDS:
        raise InputError(f"tasks.{name}.kind: expected one of {', '.join(KINDS)}, got {found['kind']!r}")
    examples = found.get("examples")
    if examples is not None and examples < 1:
        raise InputError(f"tasks.{name}.examples: expected at least 1, got {examples}")
    labels = found.get("labels")
    if labels is not None:
        if not isinstance(labels, list):
            raise InputError(f"tasks.{name}.labels: expected a list of names, got {labels!r}")
        found["labels"] = tuple(str(label) for label in labels)
    return found


_PLAIN: dict[str, tuple[type, ...]] = {
    "str": (str,), "bool": (bool,), "int": (int,), "float": (int, float), "str | None": (str, type(None)),
    "bool | None": (bool, type(None)), "int | None": (int, type(None)), "float | None": (int, float, type(None)),
}  # fmt: skip


def _section(where: str, said: Any, kind: type) -> dict[str, Any]:
    """The fields of a section, known and of the right kind, none missing."""
    if not isinstance(said, dict):
        raise InputError(f"{where}: expected values by name, got {said!r}")
    known = {each.name: each for each in fields(kind)}
    for name, value in said.items():
        if name not in known:
            raise InputError(f"{where}: expected some of {', '.join(known)}, got {name!r}")
        _require_kind(f"{where}.{name}", known[name], value)
    for name, each in known.items():
        if name not in said and each.default is MISSING and each.default_factory is MISSING:
            raise InputError(f"{where}: expected {name!r}, got {', '.join(map(repr, said)) or 'nothing'}")
    return said


def _require_kind(where: str, about: Field[Any], value: Any) -> None:
    named = about.type.__name__ if isinstance(about.type, type) else str(about.type)
    wanted = _PLAIN.get(named)
    if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
        raise InputError(f"{where}: expected {named}, got {value!r}")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2's scalars: 3e-5 is a float, without a point too, and dates, yes and no are text, as labels are."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [each for each in found if each[0].rpartition(":")[2] not in ("bool", "timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
