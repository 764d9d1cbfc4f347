"""Pruning with a multitask objective against single-task models, as a grid of training runs."""

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
from secateur.learned.shared.trainer import trainer_arguments

EIGHT = tuple(
    (method, granularity, scope)
    for granularity in ("element", "rank")
    for method in ("movement", "magnitude")
    for scope in ("global", "local")
)
ZEROS, MAGNITUDE, ATTRIBUTION = STARTS = ("zeros", "magnitude", "attribution")


@dataclass(frozen=True)
class Cell:
    """One training run. tasks: what it learns. method, granularity, scope: empty for a dense model, whose density is 1.
    scores: what movement's scores start from. low: a task that has few examples, as many as the settings say, or none."""

    tasks: tuple[str, ...]
    method: str = ""
    granularity: str = ""
    scope: str = ""
    density: float = 1.0
    scores: str = ZEROS
    low: str = ""

    @property
    def setting(self) -> tuple[str, str, str]:
        return self.method, self.granularity, self.scope

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tasks": "+".join(self.tasks)}


@dataclass(frozen=True)
class Settings:
    """What a run is about.

    densities: of each granularity, for the shared models. mixture: the settings whose single-task models are trained, at
    `single_densities`. low_density, few: of the experiment on tasks with few examples. steps: of training for each task that a
    model learns, or epochs over its examples where None. rates: learning rates of the weights, the scores, the singular values.
    examples, tested: of each task, at most; None: all.
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

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Settings:
        """What `to_json` gave."""
        return cls(**{name: _tuples(value) for name, value in found.items()})


def grid(settings: Settings) -> list[Cell]:
    """All cells of the experiments, each once; the dense shared model first, which attribution scores come from."""
    found = [Cell(settings.tasks)]
    for experiment in settings.experiments:
        found.extend(EXPERIMENTS[experiment](settings))
    return list(dict.fromkeys(found))


def _settings(settings: Settings) -> Iterator[Cell]:
    for setting in EIGHT:
        for density in settings.densities[setting[1]]:
            yield Cell(settings.tasks, *setting, density)


def _mixture(settings: Settings) -> Iterator[Cell]:
    for setting in settings.mixture:
        for density in settings.densities[setting[1]]:
            yield Cell(settings.tasks, *setting, density)
        for density in settings.single_densities[setting[1]]:
            for task in settings.tasks:
                yield Cell((task,), *setting, density)
    for task in settings.tasks:
        yield Cell((task,))


def _low_resource(settings: Settings) -> Iterator[Cell]:
    for low in settings.tasks:
        for tasks in ((low,), settings.tasks):
            yield Cell(tasks, low=low)
            yield Cell(tasks, *settings.low_setting, settings.low_density, low=low)


def _initial(settings: Settings) -> Iterator[Cell]:
    for granularity in ("element", "rank"):
        for density in settings.densities[granularity]:
            for scores in STARTS:
                yield Cell(settings.tasks, "movement", granularity, "global", density, scores)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(each) for name, each in value.items()}
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


EXPERIMENTS = {
    "settings": _settings,
    "mixture": _mixture,
    "low-resource": _low_resource,
    "initial-scores": _initial,
}


@dataclass
class Laboratory:
    """An encoder with its tasks' data. folder: of the run, for checkpoints and the dense shared model."""

    encoder: nn.Module
    tokenizer: Any
    data: Mapping[str, TaskData]
    settings: Settings
    folder: Path
    device: str = "cpu"

    def run(self, cell: Cell) -> dict[str, Any]:
        """The metric of each of the cell's tasks, their mean, the density reached, and the seconds it took. A run that was
        killed goes on from its checkpoint."""
        settings, data = self.settings, self._data(cell)
        steps = self._steps(cell)
        pruning: dict[str, Any] = {"density": cell.density, "schedule": CubicSchedule()}
        if cell.method:
            pruning |= {"method": cell.method, "granularity": cell.granularity, "scope": cell.scope}
        else:
            pruning |= {"method": "magnitude"}
        if cell.scores == ATTRIBUTION:
            pruning["initial_scores"] = self._attribution(cell.granularity)
        elif cell.scores == MAGNITUDE:
            opened: Any = {"granularity": cell.granularity, "density": 1.0}
            tasks = {name: each.task for name, each in data.items()}
            pruning["initial_scores"] = magnitude_scores(MultitaskPruning(self.encoder, tasks, **opened))
        prepared = prepare(
            self.encoder, self.tokenizer, data, seed=settings.seed, max_length=settings.max_length, **pruning
        )  # fmt: skip
        arguments = self._arguments(cell, steps)
        found = run(prepared, arguments, learning_rates=settings.rates)
        if cell == Cell(settings.tasks) and not self._dense.exists():
            save(export(found.pruning.cpu()), self._dense, tokenizer=self.tokenizer)
        shutil.rmtree(str(arguments.output_dir), ignore_errors=True)
        values = {task: found.evaluations[task].value for task in cell.tasks}
        return {
            **{f"value_{task}": values.get(task) for task in settings.tasks},
            "mean": sum(values.values()) / len(values), "reached": found.pruning.reached, "weights": found.pruning.stored,
            "steps": steps, "seconds": round(found.seconds, 1),
        }  # fmt: skip

    @property
    def _dense(self) -> Path:
        return self.folder / "dense"

    def _data(self, cell: Cell) -> dict[str, TaskData]:
        """Of the cell's tasks; the first `few` training examples of the one that has few."""
        data = {task: self.data[task] for task in cell.tasks}
        if cell.low in data:
            data[cell.low] = replace(data[cell.low], train=data[cell.low].train[: self.settings.few])
        return data

    def _steps(self, cell: Cell) -> int:
        """As many for each task as it has in a model of its own, whatever the number of examples it is left with."""
        settings = self.settings
        if settings.steps is not None:
            return settings.steps * len(cell.tasks)
        sizes = sum(len(self.data[task].train) for task in cell.tasks)
        return math.ceil(settings.epochs * sizes / settings.batch_size)

    def _arguments(self, cell: Cell, steps: int) -> Any:
        name = sha256(json.dumps(cell.to_json()).encode()).hexdigest()[:12]
        given = {
            "max_steps": steps, "per_device_train_batch_size": self.settings.batch_size, "seed": self.settings.seed,
            "learning_rate": self.settings.rates["weights"], "warmup_steps": steps // 10, "save_steps": max(steps // 4, 1),
            "logging_steps": max(steps // 10, 1),
        }  # fmt: skip
        return trainer_arguments(self.folder / f"checkpoints-{name}", self.device, given)

    def _attribution(self, granularity: str) -> Any:
        return scores_from(
            load(self._dense),
            self.encoder,
            self.tokenizer,
            self.data,
            granularity=granularity,
            max_length=self.settings.max_length,
        )
