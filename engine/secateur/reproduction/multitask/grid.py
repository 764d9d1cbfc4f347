"""The experiments on pruning with a multitask objective against single-task models, as a grid of training runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from secateur.learned.multitask.exporting import export, load, save
from secateur.learned.multitask.pruning import MultitaskPruning, magnitude_scores
from secateur.learned.multitask.run import TaskData, prepare, run, scores_from
from secateur.learned.multitask.schedule import CubicSchedule
from secateur.support.trainer import trainer_arguments

# The paper's eight settings: method, granularity, scope.
EIGHT = tuple(
    (method, granularity, scope)
    for granularity in ("element", "rank")
    for method in ("movement", "magnitude")
    for scope in ("global", "local")
)
ZEROS, MAGNITUDE, ATTRIBUTION = STARTS = ("zeros", "magnitude", "attribution")


@dataclass(frozen=True)
class Cell:
    """One training run.

    Args:
        tasks: The tasks to learn.
        method: "magnitude" or "movement"; empty for a dense model.
        granularity: "element" or "rank"; empty for a dense model.
        scope: "global" or "local"; empty for a dense model.
        density: The density; 1 for a dense model.
        scores: The initial scores of movement, one of `STARTS`.
        low: The task that gets few examples (`Settings.few`); empty for none.
    """

    tasks: tuple[str, ...]
    method: str = ""
    granularity: str = ""
    scope: str = ""
    density: float = 1.0
    scores: str = ZEROS
    low: str = ""

    @property
    def setting(self) -> tuple[str, str, str]:
        """Method, granularity and scope."""
        return self.method, self.granularity, self.scope

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values by name, with the tasks joined by "+"."""
        return {**asdict(self), "tasks": "+".join(self.tasks)}


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Args:
        model: The encoder's name, for the report.
        tasks: The tasks.
        experiments: Keys of `EXPERIMENTS`.
        densities: The densities of the shared models by granularity.
        single_densities: The densities of the single-task models by granularity.
        mixture: The settings (method, granularity, scope) of the experiment "mixture".
        low_setting: The setting of the experiment "low-resource".
        low_density: The density of "low-resource".
        few: The number of examples of the task with few examples in "low-resource".
        steps: The training steps for each task that a model learns; None to count `epochs` instead.
        epochs: The epochs over the model's examples, if `steps` is None.
        batch_size: Examples in a batch.
        rates: The learning rates of the weights, the scores and the singular values ("sigma").
        max_length: The largest number of pieces of an example.
        examples: The largest number of training examples of a task; None for all.
        tested: The largest number of evaluation examples of a task; None for all.
        seed: The seed of all training.
    """

    model: str
    tasks: tuple[str, ...]
    experiments: tuple[str, ...]
    densities: Mapping[str, tuple[float, ...]]
    single_densities: Mapping[str, tuple[float, ...]]
    mixture: tuple[tuple[str, str, str], ...] = (("movement", "element", "global"), ("magnitude", "rank", "local"))
    low_setting: tuple[str, str, str] = ("movement", "element", "global")
    low_density: float = 0.3
    few: int = 100
    steps: int | None = None
    epochs: float = 8.0
    batch_size: int = 32
    rates: Mapping[str, float] = field(default_factory=lambda: {"weights": 3e-5, "scores": 1e-2, "sigma": 5e-3})
    max_length: int = 128
    examples: int | None = None
    tested: int | None = None
    seed: int = 0

    @property
    def results(self) -> dict[str, Any]:
        """The results of a cell, with their types."""
        values: dict[str, Any] = {f"value_{task}": float | None for task in self.tasks}
        return {**values, "mean": float, "reached": float, "weights": int, "steps": int, "seconds": float}

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values by name."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Settings:
        """Build settings from what `to_json` returned."""
        return cls(**{name: _as_tuples(value) for name, value in document.items()})


def grid(settings: Settings) -> list[Cell]:
    """List the cells of all experiments, without repetition.

    The dense shared model comes first, because attribution scores are computed with it.

    Args:
        settings: The run's settings.

    Returns:
        The cells in the order in which to run them.
    """
    cells = [Cell(settings.tasks)]
    for experiment in settings.experiments:
        cells.extend(EXPERIMENTS[experiment](settings))
    return list(dict.fromkeys(cells))


def _settings(settings: Settings) -> Iterator[Cell]:
    """List the shared models of all eight settings, at all densities."""
    for setting in EIGHT:
        for density in settings.densities[setting[1]]:
            yield Cell(settings.tasks, *setting, density)


def _mixture(settings: Settings) -> Iterator[Cell]:
    """List shared and single-task models of the settings to compare, and dense single-task models."""
    for setting in settings.mixture:
        for density in settings.densities[setting[1]]:
            yield Cell(settings.tasks, *setting, density)
        for density in settings.single_densities[setting[1]]:
            for task in settings.tasks:
                yield Cell((task,), *setting, density)
    for task in settings.tasks:
        yield Cell((task,))


def _low_resource(settings: Settings) -> Iterator[Cell]:
    """List models in which one task has few examples: alone and with the others, dense and pruned."""
    for low in settings.tasks:
        for tasks in ((low,), settings.tasks):
            yield Cell(tasks, low=low)
            yield Cell(tasks, *settings.low_setting, settings.low_density, low=low)


def _initial_scores(settings: Settings) -> Iterator[Cell]:
    """List movement models with scores that start from zeros, magnitude and attribution."""
    for granularity in ("element", "rank"):
        for density in settings.densities[granularity]:
            for scores in STARTS:
                yield Cell(settings.tasks, "movement", granularity, "global", density, scores)


def _as_tuples(value: Any) -> Any:
    """Turn lists into tuples, also inside dicts and lists."""
    if isinstance(value, dict):
        return {name: _as_tuples(entry) for name, entry in value.items()}
    return tuple(_as_tuples(entry) for entry in value) if isinstance(value, list) else value


EXPERIMENTS = {
    "settings": _settings,
    "mixture": _mixture,
    "low-resource": _low_resource,
    "initial-scores": _initial_scores,
}


@dataclass
class Laboratory:
    """An encoder with its tasks' data, which runs cells.

    Args:
        encoder: The encoder. It is copied for every run.
        tokenizer: The tokenizer.
        data: The tasks and their examples by name.
        settings: The run's settings.
        folder: The run's folder, for checkpoints and the dense shared model.
        device: The device's name.
    """

    encoder: nn.Module
    tokenizer: Any
    data: Mapping[str, TaskData]
    settings: Settings
    folder: Path
    device: str = "cpu"

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run a cell. A killed run continues from its last checkpoint.

        Args:
            cell: The cell. With scores from attribution, the dense shared model's cell must be finished.

        Returns:
            The metric of each task as "value_TASK" (None for tasks that the cell does not learn), their "mean", the density
            "reached", the stored "weights", the "steps" and the time in "seconds".
        """
        settings, data = self.settings, self._data(cell)
        steps = self._steps(cell)
        options = self._pruning_options(cell, data)
        prepared = prepare(self.encoder, self.tokenizer, data, seed=settings.seed, max_length=settings.max_length, **options)
        arguments = self._arguments(cell, steps)
        result = run(prepared, arguments, learning_rates=settings.rates)
        if cell == Cell(settings.tasks) and not self._dense.exists():
            save(export(result.pruning.cpu()), self._dense, tokenizer=self.tokenizer)
        shutil.rmtree(str(arguments.output_dir), ignore_errors=True)
        values = {task: result.evaluations[task].value for task in cell.tasks}
        return {
            **{f"value_{task}": values.get(task) for task in settings.tasks},
            "mean": sum(values.values()) / len(values), "reached": result.pruning.reached, "weights": result.pruning.stored,
            "steps": steps, "seconds": round(result.seconds, 1),
        }  # fmt: skip

    def _pruning_options(self, cell: Cell, data: Mapping[str, TaskData]) -> dict[str, Any]:
        """Return the arguments of `MultitaskPruning` for a cell."""
        options: dict[str, Any] = {"density": cell.density, "schedule": CubicSchedule()}
        if cell.method:
            options |= {"method": cell.method, "granularity": cell.granularity, "scope": cell.scope}
        else:
            options |= {"method": "magnitude"}
        if cell.scores == ATTRIBUTION:
            options["initial_scores"] = self._attribution(cell.granularity)
        elif cell.scores == MAGNITUDE:
            dense_options: Any = {"granularity": cell.granularity, "density": 1.0}
            tasks = {name: task_data.task for name, task_data in data.items()}
            options["initial_scores"] = magnitude_scores(MultitaskPruning(self.encoder, tasks, **dense_options))
        return options

    @property
    def _dense(self) -> Path:
        """The folder of the dense shared model."""
        return self.folder / "dense"

    def _data(self, cell: Cell) -> dict[str, TaskData]:
        """Return the data of the cell's tasks, with only the first `few` training examples of the task `low`."""
        data = {task: self.data[task] for task in cell.tasks}
        if cell.low in data:
            data[cell.low] = replace(data[cell.low], train=data[cell.low].train[: self.settings.few])
        return data

    def _steps(self, cell: Cell) -> int:
        """Count the training steps: the sum of the steps of its tasks' single-task models. Fewer examples do not reduce it."""
        settings = self.settings
        if settings.steps is not None:
            return settings.steps * len(cell.tasks)
        sizes = sum(len(self.data[task].train) for task in cell.tasks)
        return math.ceil(settings.epochs * sizes / settings.batch_size)

    def _arguments(self, cell: Cell, steps: int) -> Any:
        """Build the Trainer's arguments; a cell has a checkpoint folder of its own."""
        name = sha256(json.dumps(cell.to_json()).encode()).hexdigest()[:12]
        given = {
            "max_steps": steps, "per_device_train_batch_size": self.settings.batch_size, "seed": self.settings.seed,
            "learning_rate": self.settings.rates["weights"], "warmup_steps": steps // 10, "save_steps": max(steps // 4, 1),
            "logging_steps": max(steps // 10, 1),
        }  # fmt: skip
        return trainer_arguments(self.folder / f"checkpoints-{name}", self.device, given)

    def _attribution(self, granularity: str) -> Any:
        """Compute attribution scores with the dense shared model."""
        return scores_from(
            load(self._dense),
            self.encoder,
            self.tokenizer,
            self.data,
            granularity=granularity,
            max_length=self.settings.max_length,
        )
