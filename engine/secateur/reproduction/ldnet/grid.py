"""LD-Net's experiments as a grid of training runs: language models, taggers on them, and the same taggers pruned."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.data.conll import Sentence
from secateur.learned.ldnet import lm_training
from secateur.learned.ldnet.deletion import delete_closed, flops_per_word
from secateur.learned.ldnet.folders import LMConfig, load_lm, load_tagger, save_lm, save_tagger
from secateur.learned.ldnet.run import Stage, new_tagger, tagger_without_lm, train_stage
from secateur.learned.ldnet.tagger import Tagger
from secateur.learned.ldnet.tagger_training import GatePenalty
from secateur.learned.ldnet.tagging import evaluate
from secateur.learned.ldnet.vocabulary import Vocabulary
from secateur.reproduction.ldnet.measuring import detached, interleaved_words_per_second
from secateur.support.errors import InputError
from secateur.support.files import write_atomically

WITH_DROPOUT, WITHOUT_DROPOUT, NO_LM = "layer dropout", "no layer dropout", "no LM"
LAYER_DROPOUT = {WITH_DROPOUT: 0.5, WITHOUT_DROPOUT: 0.0}
# What a cell has beside its seconds; None where it says nothing.
MEASURES = (
    "perplexity_forward", "perplexity_backward", "metric", "dev", "dev_low", "dev_high", "test", "test_low", "test_high",
    "layers", "flops", "lm_flops", "words_per_second", "whole_words_per_second", "speedup", "gates", "detached",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training run. lm: which language models. task: whose tagger; empty for the language models themselves. wanted: how
    many layers of both directions the penalty lets stay; None for the tagger before it."""

    lm: str
    task: str = ""
    wanted: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def folder(self) -> str:
        """A name for what the run leaves in files."""
        wanted = "" if self.wanted is None else str(self.wanted)
        return "-".join(part for part in (self.lm.replace(" ", "-"), self.task, wanted) if part)


@dataclass(frozen=True)
class Settings:
    """What a run is about.

    files: the size of each file that is read, by what it is for. columns: of the tasks' tags, in the column files. wanted: the
    numbers of layers that are tried. layers, width: of the language models, in each direction; steps: of their training;
    projection: the width of what their softmax reads, 0 for all layers. epochs, prune_epochs: of the whole taggers, and with
    the penalty. examples, tested: sentences to train a tagger on, and of dev to evaluate on, at most; None: all. draws: orders
    in which layers are detached; rounds: of the timing.
    """

    files: Mapping[str, tuple[str, int]]
    columns: Mapping[str, str]
    wanted: tuple[int, ...]
    token_column: str = "1"
    layers: int = 10
    width: int = 50
    projection: int = 100
    steps: int = 1000
    lm_batch_size: int = 32
    lm_learning_rate: float = 3e-3
    min_count: int = 3
    epochs: float = 10.0
    prune_epochs: float = 10.0
    batch_size: int = 10
    learning_rate: float = 0.015
    gate_learning_rate: float = 0.15
    lambda0: float = 0.05
    features: int = 100
    word_width: int = 50
    hidden: int = 64
    examples: int | None = None
    tested: int | None = None
    draws: int = 3
    rounds: int = 9
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Settings:
        """What `to_json` gave."""
        files = {name: (path, size) for name, (path, size) in found["files"].items()}
        return cls(**{**found, "files": files, "wanted": tuple(found["wanted"])})


@dataclass(frozen=True)
class TaskSentences:
    """A task's sentences, tags of spans in BIOES; test may be empty."""

    train: Sequence[Sentence]
    dev: Sequence[Sentence]
    test: Sequence[Sentence]


def grid(settings: Settings) -> list[Cell]:
    """The language models, then the taggers on them and without them, then the pruned ones."""
    cells = [Cell(lm) for lm in LAYER_DROPOUT]
    cells += [Cell(lm, task) for task in settings.columns for lm in (NO_LM, *LAYER_DROPOUT)]
    return cells + [cell for task in settings.columns for cell in pruned_cells(settings, task)]


def pruned_cells(settings: Settings, task: str) -> list[Cell]:
    """A task's taggers that are trained with the penalty. One that may keep all layers, a control, has layer dropout alone."""
    everything = 2 * settings.layers
    return [
        Cell(lm, task, wanted)
        for wanted in settings.wanted
        for lm in LAYER_DROPOUT
        if wanted < everything or lm == WITH_DROPOUT
    ]


@dataclass
class Laboratory:
    """The tasks' sentences. text: a file to train the language models on, else the tokens of all training sentences of the
    first task. folder: of the run, for models and checkpoints. Raises InputError: text without words that come often enough, or
    as `read_sentences`."""

    tasks: Mapping[str, TaskSentences]
    text: Path | None
    settings: Settings
    folder: Path
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Counts the words, so that text that is no good is refused before anything is written."""
        tokens = (sentence.tokens for sentence in next(iter(self.tasks.values())).train)
        lines = tokens if self.text is None else lm_training.read_sentences([self.text])
        self.words = Vocabulary.count((word for line in lines for word in line), at_least=self.settings.min_count)
        if len(self.words) < 3:
            raise InputError(f"text: expected words that come at least {self.settings.min_count} times, got none")

    def run(self, cell: Cell) -> dict[str, Any]:
        """What the cell came to, and the seconds it took. A run that was killed goes on from its checkpoint."""
        start = time.perf_counter()
        torch.manual_seed(self.settings.seed)
        if not cell.task:
            found = self._language_models(cell)
        else:
            found = self._whole(cell) if cell.wanted is None else self._pruned(cell, cell.wanted)
        return {**dict.fromkeys(MEASURES), **found, "seconds": round(time.perf_counter() - start, 1)}

    def _language_models(self, cell: Cell) -> dict[str, Any]:
        settings, words = self.settings, self.words
        cutoffs = tuple(lm_training.default_cutoffs(len(words)))
        widths = (settings.width,) * settings.layers
        config = LMConfig(settings.width, widths, cutoffs, settings.projection, LAYER_DROPOUT[cell.lm], 0.01)
        models = config.build(len(words))
        lines = lm_training.Lines([self._text()], words, max_length=128)
        lm_training.run(
            models, lines, self._checkpoints(cell), self.device, max_steps=settings.steps,
            per_device_train_batch_size=settings.lm_batch_size, learning_rate=settings.lm_learning_rate, seed=settings.seed,
            save_steps=max(1, settings.steps // 4), logging_steps=max(1, settings.steps // 50),
        )  # fmt: skip
        dev = next(iter(self.tasks.values())).dev
        ahead, back = lm_training.perplexity(models, ([1, *words.numbers(sentence.tokens), 1] for sentence in dev))
        if not self._place(cell).exists():
            save_lm(models, config, words, self._place(cell))
        return {"perplexity_forward": ahead, "perplexity_backward": back}

    def _whole(self, cell: Cell) -> dict[str, Any]:
        settings, task = self.settings, self.tasks[cell.task]
        sizes = {"features": settings.features, "word_width": settings.word_width, "hidden": settings.hidden}
        train = task.train[: settings.examples]
        if cell.lm == NO_LM:
            tagger = tagger_without_lm(train, "bioes", **sizes)
        else:
            models, _, words = load_lm(self._place(Cell(cell.lm)))
            tagger = new_tagger(models, words, train, "bioes", **sizes)
        self._train(cell, tagger, settings.epochs)
        if not self._place(cell).exists():
            save_tagger(tagger, self._place(cell))
        found = self._evaluated(tagger, task)
        if cell.lm != NO_LM:
            found["detached"] = detached(tagger, task.dev[: settings.tested], settings.draws, settings.seed)
        return found

    def _pruned(self, cell: Cell, wanted: int) -> dict[str, Any]:
        settings, task = self.settings, self.tasks[cell.task]
        place = self._place(Cell(cell.lm, cell.task))
        whole, tagger = load_tagger(place).to(self.device), load_tagger(place)
        penalty = GatePenalty(settings.lambda0, wanted, learning_rate=settings.gate_learning_rate)
        log = self._train(cell, tagger, settings.prune_epochs, penalty)
        pruned = delete_closed(tagger).eval()
        tokens = [sentence.tokens for sentence in task.dev[: settings.tested]]
        before, after, ratio = interleaved_words_per_second(whole, pruned, tokens, settings.rounds)
        return {
            **self._evaluated(pruned, task), "gates": [row["gates"] for row in log if "loss" in row],
            "whole_words_per_second": before, "words_per_second": after, "speedup": ratio,
        }  # fmt: skip

    def _train(self, cell: Cell, tagger: Tagger, epochs: float, penalty: GatePenalty | None = None) -> list[dict[str, Any]]:
        settings, task = self.settings, self.tasks[cell.task]
        stage = Stage(epochs, settings.batch_size, settings.learning_rate, settings.seed)
        train, dev = task.train[: settings.examples], task.dev[: settings.tested]
        log, _ = train_stage(tagger, train, dev, stage, self._checkpoints(cell), self.device, penalty=penalty)
        return log

    def _evaluated(self, tagger: Tagger, task: TaskSentences) -> dict[str, Any]:
        flops = flops_per_word(tagger)
        found: dict[str, Any] = {
            "layers": sum(len(gates) for gates in tagger.gates), "flops": flops["all"], "lm_flops": flops["language models"]
        }  # fmt: skip
        for name, sentences in (("dev", task.dev[: self.settings.tested]), ("test", task.test)):
            if sentences:
                scored = evaluate(tagger, sentences)
                found |= {"metric": scored.metric, name: scored.value, f"{name}_low": scored.low, f"{name}_high": scored.high}
        return found

    def _text(self) -> Path:
        if self.text is not None:
            return self.text
        path = self.folder / "text.txt"
        if not path.exists():
            train = next(iter(self.tasks.values())).train
            write_atomically(path, "".join(" ".join(sentence.tokens) + "\n" for sentence in train))
        return path

    def _place(self, cell: Cell) -> Path:
        return self.folder / cell.folder

    def _checkpoints(self, cell: Cell) -> Path:
        return self.folder / f"checkpoints-{cell.folder}"
