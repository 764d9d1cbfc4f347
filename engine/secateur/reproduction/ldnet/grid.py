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
# The measures of a cell, beside its seconds. A measure that a cell does not have is None.
MEASURES = (
    "perplexity_forward", "perplexity_backward", "metric", "dev", "dev_low", "dev_high", "test", "test_low", "test_high",
    "layers", "flops", "lm_flops", "words_per_second", "whole_words_per_second", "speedup", "gates", "detached",
)  # fmt: skip
# The results of a cell, with their types.
RESULTS: dict[str, Any] = {
    **dict.fromkeys(MEASURES, float | None),
    "metric": str | None,
    "gates": list[list[float]] | None,
    "detached": list[list[float]] | None,
    "seconds": float,
}


@dataclass(frozen=True)
class Cell:
    """One training run.

    Args:
        lm: The kind of language models: a key of `LAYER_DROPOUT`, or `NO_LM`.
        task: The tagger's task; empty to train the language models themselves.
        wanted: The number of layers of both directions that the penalty lets stay; None for the tagger before the penalty.
    """

    lm: str
    task: str = ""
    wanted: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values by name."""
        return asdict(self)

    @property
    def folder(self) -> str:
        """The name of the folder that holds the cell's model."""
        wanted = "" if self.wanted is None else str(self.wanted)
        return "-".join(part for part in (self.lm.replace(" ", "-"), self.task, wanted) if part)


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Args:
        files: The path and the size in bytes of each file that is read, by its purpose.
        columns: The tasks, and the column of their tags in the column files.
        wanted: The numbers of layers to prune to.
        token_column: The column of the words.
        layers: The language models' layers in each direction.
        width: The width of their layers and word embeddings.
        projection: The width that their softmax reads; 0 for no projection.
        steps: The steps of their training.
        lm_batch_size: Sentences in a batch of their training.
        lm_learning_rate: The learning rate of their training.
        min_count: How often a word must occur to be in their vocabulary.
        epochs: The epochs of a tagger with all layers.
        prune_epochs: The epochs with the penalty.
        batch_size: Sentences in a tagger's batch.
        learning_rate: A tagger's learning rate.
        gate_learning_rate: The gates' learning rate.
        lambda0: The weight of the penalty.
        features: The width of r_t, the features of the language models' states.
        word_width: The width of a tagger's word embeddings.
        hidden: The width of a tagger's LSTM in each direction.
        examples: The largest number of sentences to train a tagger on; None for all.
        tested: The largest number of sentences of dev to evaluate on; None for all.
        draws: The number of random orders in which layers are detached.
        rounds: The rounds of the timing.
        seed: The seed of all training.
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
        """Return the settings as JSON values by name."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Settings:
        """Build settings from what `to_json` returned."""
        files = {name: (path, size) for name, (path, size) in document["files"].items()}
        return cls(**{**document, "files": files, "wanted": tuple(document["wanted"])})


@dataclass(frozen=True)
class TaskSentences:
    """A task's sentences, with tags of spans in BIOES. `test` may be empty."""

    train: Sequence[Sentence]
    dev: Sequence[Sentence]
    test: Sequence[Sentence]


def grid(settings: Settings) -> list[Cell]:
    """List the cells in the order in which to run them: language models, taggers with and without them, pruned taggers."""
    cells = [Cell(lm) for lm in LAYER_DROPOUT]
    cells += [Cell(lm, task) for task in settings.columns for lm in (NO_LM, *LAYER_DROPOUT)]
    return cells + [cell for task in settings.columns for cell in pruned_cells(settings, task)]


def pruned_cells(settings: Settings, task: str) -> list[Cell]:
    """List a task's cells with the penalty.

    A cell that may keep all layers is a control. There is a control only for language models with layer dropout.
    """
    everything = 2 * settings.layers
    return [
        Cell(lm, task, wanted)
        for wanted in settings.wanted
        for lm in LAYER_DROPOUT
        if wanted < everything or lm == WITH_DROPOUT
    ]


@dataclass
class Laboratory:
    """The tasks' sentences and the language models' text, which runs cells.

    Args:
        tasks: The tasks' sentences by name.
        text: A text file to train the language models on. None takes all training sentences of the first task.
        settings: The run's settings.
        folder: The run's folder, for models and checkpoints.
        device: The device's name.

    Raises:
        InputError: No word of the text occurs often enough, or as in `read_sentences`.
    """

    tasks: Mapping[str, TaskSentences]
    text: Path | None
    settings: Settings
    folder: Path
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Count the words, so that an unusable text is refused before anything is written."""
        tokens = (sentence.tokens for sentence in next(iter(self.tasks.values())).train)
        lines = tokens if self.text is None else lm_training.read_sentences([self.text])
        self.words = Vocabulary.count((word for line in lines for word in line), at_least=self.settings.min_count)
        if len(self.words) < 3:
            raise InputError(f"text: expected words that occur at least {self.settings.min_count} times, got none")

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run a cell. A killed run continues from its last checkpoint.

        Args:
            cell: The cell. The cells that it builds on must be finished.

        Returns:
            The values of `MEASURES`, and the time in "seconds".
        """
        start = time.perf_counter()
        torch.manual_seed(self.settings.seed)
        if not cell.task:
            measures = self._language_models(cell)
        else:
            measures = self._whole(cell) if cell.wanted is None else self._pruned(cell, cell.wanted)
        return {**dict.fromkeys(MEASURES), **measures, "seconds": round(time.perf_counter() - start, 1)}

    def _language_models(self, cell: Cell) -> dict[str, Any]:
        """Train and save language models; measure their perplexities."""
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
        if not self._model_folder(cell).exists():
            save_lm(models, config, words, self._model_folder(cell))
        return {"perplexity_forward": ahead, "perplexity_backward": back}

    def _whole(self, cell: Cell) -> dict[str, Any]:
        """Train, save and measure a tagger with all layers."""
        settings, task = self.settings, self.tasks[cell.task]
        sizes = {"features": settings.features, "word_width": settings.word_width, "hidden": settings.hidden}
        train = task.train[: settings.examples]
        if cell.lm == NO_LM:
            tagger = tagger_without_lm(train, "bioes", **sizes)
        else:
            models, _, words = load_lm(self._model_folder(Cell(cell.lm)))
            tagger = new_tagger(models, words, train, "bioes", **sizes)
        self._train(cell, tagger, settings.epochs)
        if not self._model_folder(cell).exists():
            save_tagger(tagger, self._model_folder(cell))
        measures = self._evaluated(tagger, task)
        if cell.lm != NO_LM:
            measures["detached"] = detached(tagger, task.dev[: settings.tested], settings.draws, settings.seed)
        return measures

    def _pruned(self, cell: Cell, wanted: int) -> dict[str, Any]:
        """Train a whole tagger further with the penalty, delete its closed layers, and measure it beside the whole one."""
        settings, task = self.settings, self.tasks[cell.task]
        whole_folder = self._model_folder(Cell(cell.lm, cell.task))
        whole, tagger = load_tagger(whole_folder).to(self.device), load_tagger(whole_folder)
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
        """Train a tagger in place; return the Trainer's log."""
        settings, task = self.settings, self.tasks[cell.task]
        stage = Stage(epochs, settings.batch_size, settings.learning_rate, settings.seed)
        train, dev = task.train[: settings.examples], task.dev[: settings.tested]
        log, _ = train_stage(tagger, train, dev, stage, self._checkpoints(cell), self.device, penalty=penalty)
        return log

    def _evaluated(self, tagger: Tagger, task: TaskSentences) -> dict[str, Any]:
        """Measure a tagger's layers, FLOPs and metric."""
        flops = flops_per_word(tagger)
        measures: dict[str, Any] = {
            "layers": sum(len(gates) for gates in tagger.gates), "flops": flops["all"], "lm_flops": flops["language models"]
        }  # fmt: skip
        for name, sentences in (("dev", task.dev[: self.settings.tested]), ("test", task.test)):
            if sentences:
                scored = evaluate(tagger, sentences)
                measures |= {
                    "metric": scored.metric, name: scored.value, f"{name}_low": scored.low, f"{name}_high": scored.high
                }  # fmt: skip
        return measures

    def _text(self) -> Path:
        """Return the language models' text file, which is written here if none was given."""
        if self.text is not None:
            return self.text
        path = self.folder / "text.txt"
        if not path.exists():
            train = next(iter(self.tasks.values())).train
            write_atomically(path, "".join(" ".join(sentence.tokens) + "\n" for sentence in train))
        return path

    def _model_folder(self, cell: Cell) -> Path:
        """Return the folder of a cell's model."""
        return self.folder / cell.folder

    def _checkpoints(self, cell: Cell) -> Path:
        """Return the folder of a cell's checkpoints."""
        return self.folder / f"checkpoints-{cell.folder}"
