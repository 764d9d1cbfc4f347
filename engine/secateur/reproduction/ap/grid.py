"""Attribution-based pruning (Yang et al. 2023, arXiv 2205.04157): its six experiments as a grid of cells."""

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
RANDOM = ("random", "rap")  # Criteria with a seed, averaged over the draws.
# The paper's five, and what is strong today.
CRITERIA = ("ap", "fpp", "rap", "random", "svd", "gradient", "ig:nodes=4", "magnitude", "wanda", "fisher", "flap")


@dataclass(frozen=True)
class Job:
    """One task of the multi-task model. pool: examples to score on, of which the first `scored` are taken where a cell does not
    draw its own; test: others."""

    task: Task
    pool: list[Example]
    scored: int | None
    test: list[Example]


@dataclass(frozen=True)
class Cell:
    """One accuracy: what is pruned, by which scores, and what it is tested on. Experiments may share it.

    encoder, decoder: the rates p at which units go. sites: words of a selection within these stacks. examples: how many, class
    by class, the scores are from; 0: all. draw: of the examples or of what is random.
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
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """What a run is about.

    layers: of the encoder and of the decoder. tasks: in the order of the figures. detailed: the tasks of the low-resource
    experiment and of that by layers. unseen: a task that is tested with its own scores, with a related task's and with an
    unrelated one's. examples, tested: how many of each task are scored and tested on; None: all.
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
        """Selections within a stack, by type of layer and by depth: its low, middle and high third."""
        count = self.layers[STACKS.index(stack)]
        edges = [round(third * count / 3) for third in range(4)]
        depths = [f"{low}-{high - 1}" for low, high in pairwise(edges) if low < high]
        return ["ffn", "self", *(["cross"] if stack == "decoder" else []), *depths]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def grid(settings: Settings) -> list[Cell]:
    """All cells of the experiments, each once."""
    found = [Cell(task, task, "", 0.0, 0.0) for task in settings.tasks]
    for experiment in settings.experiments:
        found.extend(EXPERIMENTS[experiment](settings))
    return list(dict.fromkeys(found))


def _accuracy(settings: Settings) -> Iterator[Cell]:
    for task in settings.tasks:
        for criterion in settings.criteria:
            for draw in range(settings.draws if criterion in RANDOM else 1):
                for rates in _alone(settings.rates):
                    yield Cell(task, task, criterion, *rates, draw=draw)


def _both(settings: Settings) -> Iterator[Cell]:
    for task in settings.tasks:
        for encoder in (0.0, *settings.coarse):
            for decoder in (0.0, *settings.coarse):
                if encoder or decoder:
                    yield Cell(task, task, "ap", encoder, decoder)


def _low_resource(settings: Settings) -> Iterator[Cell]:
    for task in settings.detailed:
        for size in settings.sizes:
            for draw in range(settings.draws):
                for rates in _alone(settings.coarse):
                    yield Cell(task, task, "ap", *rates, examples=size, draw=draw)


def _unsupervised(settings: Settings) -> Iterator[Cell]:
    for task in settings.tasks:
        for criterion in ("ap", "ap-unsupervised"):
            for rates in _alone(settings.rates):
                yield Cell(task, task, criterion, *rates)


def _unseen(settings: Settings) -> Iterator[Cell]:
    tested = settings.unseen[0] if settings.unseen else ""
    for scored in settings.unseen:
        for rates in _alone(settings.rates):
            yield Cell(scored, tested, "ap", *rates)


def _layers(settings: Settings) -> Iterator[Cell]:
    for task in settings.detailed:
        for stack in STACKS:
            for words in settings.parts(stack):
                for rate in settings.coarse:
                    rates = (rate, 0.0) if stack == "encoder" else (0.0, rate)
                    yield Cell(task, task, "ap", *rates, sites=words)


def _alone(rates: Sequence[float]) -> list[tuple[float, float]]:
    """Rates of the encoder alone, then of the decoder alone."""
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
    """A model with its tasks, and the scores made so far, which are kept in a folder."""

    model: nn.Module
    jobs: Mapping[str, Job]
    unit: AttentionUnit
    folder: Path
    _scores: dict[str, Scores] = field(default_factory=dict)

    def run(self, cell: Cell) -> dict[str, Any]:
        """The accuracy of a cell, with its interval, and the seconds it took."""
        start = time.perf_counter()
        found = evaluate(self._pruned(cell), self.jobs[cell.tested].task, self.jobs[cell.tested].test)
        about = {"metric": found.metric, "value": found.value, "low": found.low, "high": found.high}
        return {**about, "seconds": round(time.perf_counter() - start, 3)}

    def _pruned(self, cell: Cell) -> nn.Module:
        rates = {stack: rate for stack, rate in (("encoder", cell.encoder), ("decoder", cell.decoder)) if rate}
        if not rates:
            return self.model
        words = {stack: f"{stack}.{cell.sites}" if cell.sites else stack for stack in rates}
        if cell.criterion == "svd":
            model = self.model
            for stack, rate in rates.items():
                model = factorise(model, 1 - rate, select=words[stack])
            return model
        scores = self._scored(cell)
        plans = [plan(scores.of(words[stack]), keep=1 - rate) for stack, rate in rates.items()]
        kept = {name: each[name] for each in plans for name in each}
        sites = tuple(site for each in plans for site in each.sites)
        return prune(self.model, Plan(kept, sites, scores.fingerprint))

    def _scored(self, cell: Cell) -> Scores:
        """The scores that a cell prunes by: made once, and read from the folder by a run that goes on."""
        about = [cell.criterion, cell.scored, cell.examples, cell.draw, self.unit]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        path = self.folder / f"{key}.safetensors"
        if key not in self._scores:
            if not path.exists():
                self.folder.mkdir(exist_ok=True)
                self._attribute(cell).save(path)
            self._scores = {key: Scores.load(path)}  # Cells that share scores follow one another.
        return self._scores[key]

    def _attribute(self, cell: Cell) -> Scores:
        job, name = self.jobs[cell.scored], cell.criterion
        rows = balanced(job.pool, cell.examples, cell.draw) if cell.examples else job.pool[: job.scored]
        return attribute(
            self.model, job.task, rows, criterion=criterion_named(f"{name}:seed={cell.draw}" if name in RANDOM else name),
            unit=self.unit,
        )  # fmt: skip


def balanced(examples: Sequence[Example], count: int, draw: int) -> list[Example]:
    """`count` examples, as many of each target as there are, as equal as can be; there must be so many."""
    shuffled = random.Random(draw).sample(list(examples), len(examples))
    classes: dict[str, list[Example]] = {}
    for example in shuffled:
        classes.setdefault(str(example["target"]), []).append(example)
    found: list[Example] = []
    while len(found) < count:
        for each in classes.values():
            if each and len(found) < count:
                found.append(each.pop())
    return found
