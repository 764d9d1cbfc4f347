"""The six experiments on attribution-based pruning (Yang et al. 2023, arXiv 2205.04157) as a grid of cells."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from secateur.attribution.attribute import attribute
from secateur.attribution.criteria import criterion_named
from secateur.attribution.scores import Scores
from secateur.data.examples import Example
from secateur.measuring.evaluate import evaluate
from secateur.model.sites import AttentionUnit
from secateur.planning.plan import Plan, plan
from secateur.pruning.factorise import factorise
from secateur.pruning.prune import prune
from secateur.tasks import Task

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
COARSE = (0.1, 0.3, 0.5, 0.7, 0.9)
STACKS = ("encoder", "decoder")
RANDOM = ("random", "rap")  # Criteria with a seed, which are averaged over the draws.
# The paper's five criteria, then newer strong ones.
CRITERIA = ("ap", "fpp", "rap", "random", "svd", "gradient", "ig:nodes=4", "magnitude", "wanda", "fisher", "flap")
# The results of a cell, with their types.
RESULTS = {"metric": str, "value": float, "low": float, "high": float, "seconds": float}


@dataclass(frozen=True)
class TaskExamples:
    """A task of the multi-task model, with its examples.

    Args:
        task: The task.
        pool: The examples for scoring.
        scored: The number of examples to score on, from the first of `pool` on, in cells that do not draw examples. None takes
            all.
        test: The examples for testing.
    """

    task: Task
    pool: list[Example]
    scored: int | None
    test: list[Example]


@dataclass(frozen=True)
class Cell:
    """One measurement: prune a part of the model by some scores, and test it on a task. Experiments can share a cell.

    Args:
        scored: The task whose examples the scores come from.
        tested: The task that the pruned model is tested on.
        criterion: The criterion; empty for the dense model.
        encoder: The pruning rate p of the encoder.
        decoder: The pruning rate p of the decoder.
        sites: A selection of sites within these stacks; empty for all.
        examples: The number of examples for the scores, balanced over the classes; 0 for all.
        draw: The number of the draw, which seeds the choice of examples and random criteria.
    """

    scored: str
    tested: str
    criterion: str
    encoder: float
    decoder: float
    sites: str = ""
    examples: int = 0
    draw: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values by name."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Args:
        model: The model's name, for the report.
        layers: The number of layers of the encoder and of the decoder.
        tasks: The tasks, in the order of the figures.
        detailed: The tasks of the experiments "low-resource" and "layers".
        unseen: Three tasks: the one to test, a related one and an unrelated one. The first is pruned by the scores of each.
        experiments: Keys of `EXPERIMENTS`.
        criteria: The criteria to compare.
        rates: The pruning rates p of most experiments.
        coarse: The pruning rates p of the experiments "both", "low-resource" and "layers".
        sizes: The numbers of examples in "low-resource".
        draws: The number of draws of random criteria and of examples.
        unit: The unit of attention pruning.
        examples: The number of examples of each task to score on; None for all.
        tested: The number of examples of each task to test on; None for all.
    """

    model: str
    layers: tuple[int, int]
    tasks: tuple[str, ...]
    detailed: tuple[str, ...]
    unseen: tuple[str, ...]
    experiments: tuple[str, ...]
    criteria: tuple[str, ...] = CRITERIA
    rates: tuple[float, ...] = RATES
    coarse: tuple[float, ...] = COARSE
    sizes: tuple[int, ...] = (10, 100, 1000)
    draws: int = 5
    unit: AttentionUnit = "channel"
    examples: int | None = 300
    tested: int | None = 200

    def parts(self, stack: str) -> list[str]:
        """Return the selections within a stack: by type of layer, then the low, middle and high third of its layers."""
        count = self.layers[STACKS.index(stack)]
        edges = [round(third * count / 3) for third in range(4)]
        depths = [f"{low}-{high - 1}" for low, high in pairwise(edges) if low < high]
        return ["ffn", "self", *(["cross"] if stack == "decoder" else []), *depths]

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values by name."""
        return asdict(self)


def grid(settings: Settings) -> list[Cell]:
    """List the cells of all experiments, without repetition. The dense model's cells come first.

    Args:
        settings: The run's settings.

    Returns:
        The cells in the order in which to run them.
    """
    cells = [Cell(task, task, "", 0.0, 0.0) for task in settings.tasks]
    for experiment in settings.experiments:
        cells.extend(EXPERIMENTS[experiment](settings))
    return list(dict.fromkeys(cells))


def _accuracy(settings: Settings) -> Iterator[Cell]:
    """List all criteria at all rates, for the encoder alone and the decoder alone."""
    for task in settings.tasks:
        for criterion in settings.criteria:
            for draw in range(settings.draws if criterion in RANDOM else 1):
                for rates in _one_stack_rates(settings.rates):
                    yield Cell(task, task, criterion, *rates, draw=draw)


def _both(settings: Settings) -> Iterator[Cell]:
    """List AP with encoder and decoder pruned together, at the coarse rates."""
    for task in settings.tasks:
        for encoder in (0.0, *settings.coarse):
            for decoder in (0.0, *settings.coarse):
                if encoder or decoder:
                    yield Cell(task, task, "ap", encoder, decoder)


def _low_resource(settings: Settings) -> Iterator[Cell]:
    """List AP with few examples, for several sizes and draws."""
    for task in settings.detailed:
        for size in settings.sizes:
            for draw in range(settings.draws):
                for rates in _one_stack_rates(settings.coarse):
                    yield Cell(task, task, "ap", *rates, examples=size, draw=draw)


def _unsupervised(settings: Settings) -> Iterator[Cell]:
    """List AP with and without labels at all rates."""
    for task in settings.tasks:
        for criterion in ("ap", "ap-unsupervised"):
            for rates in _one_stack_rates(settings.rates):
                yield Cell(task, task, criterion, *rates)


def _unseen(settings: Settings) -> Iterator[Cell]:
    """List the first unseen task, pruned by the scores of that task, a related one and an unrelated one."""
    tested = settings.unseen[0] if settings.unseen else ""
    for scored in settings.unseen:
        for rates in _one_stack_rates(settings.rates):
            yield Cell(scored, tested, "ap", *rates)


def _layers(settings: Settings) -> Iterator[Cell]:
    """List AP on parts of a stack, by type of layer and by depth."""
    for task in settings.detailed:
        for stack in STACKS:
            for selection in settings.parts(stack):
                for rate in settings.coarse:
                    rates = (rate, 0.0) if stack == "encoder" else (0.0, rate)
                    yield Cell(task, task, "ap", *rates, sites=selection)


def _one_stack_rates(rates: Sequence[float]) -> list[tuple[float, float]]:
    """List pairs of rates (encoder, decoder) that prune only the encoder, then those that prune only the decoder."""
    return [(rate, 0.0) for rate in rates] + [(0.0, rate) for rate in rates]


EXPERIMENTS = {
    "accuracy": _accuracy,
    "both": _both,
    "low-resource": _low_resource,
    "unsupervised": _unsupervised,
    "unseen": _unseen,
    "layers": _layers,
}


@dataclass
class Laboratory:
    """A model with its tasks, which runs cells.

    Args:
        model: The dense model.
        tasks: The tasks and their examples by name.
        unit: The unit of attention pruning.
        folder: The folder that keeps the computed scores.
    """

    model: nn.Module
    tasks: Mapping[str, TaskExamples]
    unit: AttentionUnit
    folder: Path
    _scores: dict[str, Scores] = field(default_factory=dict)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run a cell.

        Args:
            cell: The cell.

        Returns:
            As in `RESULTS`: "metric", its "value" with the 95% interval from "low" to "high", and the time in "seconds".
        """
        start = time.perf_counter()
        tested = self.tasks[cell.tested]
        evaluation = evaluate(self._pruned(cell), tested.task, tested.test)
        return {
            "metric": evaluation.metric, "value": evaluation.value, "low": evaluation.low, "high": evaluation.high,
            "seconds": round(time.perf_counter() - start, 3),
        }  # fmt: skip

    def _pruned(self, cell: Cell) -> nn.Module:
        """Prune the model as the cell says."""
        rates = {stack: rate for stack, rate in (("encoder", cell.encoder), ("decoder", cell.decoder)) if rate}
        if not rates:
            return self.model
        selections = {stack: f"{stack}.{cell.sites}" if cell.sites else stack for stack in rates}
        if cell.criterion == "svd":
            model = self.model
            for stack, rate in rates.items():
                model = factorise(model, 1 - rate, select=selections[stack])
            return model
        scores = self._scores_of(cell)
        plans = [plan(scores.of(selections[stack]), keep=1 - rate) for stack, rate in rates.items()]
        kept = {name: stack_plan[name] for stack_plan in plans for name in stack_plan}
        sites = tuple(site for stack_plan in plans for site in stack_plan.sites)
        return prune(self.model, Plan(kept, sites, scores.fingerprint))

    def _scores_of(self, cell: Cell) -> Scores:
        """Return the scores that a cell prunes by. They are computed once; a resumed run reads them from the folder."""
        identity = [cell.criterion, cell.scored, cell.examples, cell.draw, self.unit]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        path = self.folder / f"{key}.safetensors"
        if key not in self._scores:
            if not path.exists():
                self.folder.mkdir(exist_ok=True)
                self._attribute(cell).save(path)
            # Only the last scores are kept in memory, because cells that share scores follow one another.
            self._scores = {key: Scores.load(path)}
        return self._scores[key]

    def _attribute(self, cell: Cell) -> Scores:
        """Compute the scores that a cell prunes by."""
        scored, name = self.tasks[cell.scored], cell.criterion
        rows = balanced(scored.pool, cell.examples, cell.draw) if cell.examples else scored.pool[: scored.scored]
        criterion = criterion_named(f"{name}:seed={cell.draw}" if name in RANDOM else name)
        return attribute(self.model, scored.task, rows, criterion=criterion, unit=self.unit)


def balanced(examples: Sequence[Example], count: int, draw: int) -> list[Example]:
    """Draw examples with targets that are as balanced as possible.

    A target with too few examples gives all of them, and the other targets give more.

    Args:
        examples: The examples to draw from, at least `count`.
        count: The number of examples to draw.
        draw: The seed.

    Returns:
        `count` examples.
    """
    shuffled = random.Random(draw).sample(list(examples), len(examples))
    classes: dict[str, list[Example]] = {}
    for example in shuffled:
        classes.setdefault(str(example["target"]), []).append(example)
    drawn: list[Example] = []
    while len(drawn) < count:
        for class_examples in classes.values():
            if class_examples and len(drawn) < count:
                drawn.append(class_examples.pop())
    return drawn
