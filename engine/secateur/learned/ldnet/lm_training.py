"""Training of the language models on text files by Hugging Face's Trainer, and their perplexity."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from secateur.data.conll import numbered_lines
from secateur.learned.ldnet.arguments import ldnet_arguments
from secateur.learned.ldnet.dense_lm import LanguageModels
from secateur.learned.ldnet.vocabulary import Vocabulary
from secateur.learned.shared.trainer import Progress, QuietTrainer, last_checkpoint
from secateur.support.errors import InputError
from secateur.tasks.batches import model_device, pad

# Of the adaptive softmax in the paper's code; those below the number of words are taken.
CUTOFFS = (4000, 40000, 200000)


def read_sentences(paths: Sequence[Path]) -> Iterator[list[str]]:
    """The words of each line that has any, file after file. Raises InputError: a file that cannot be read or is not UTF-8 (with
    the line), or has no word."""
    for path in paths:
        found = False
        for _, line in numbered_lines(path):
            words = line.split()
            if words:
                found = True
                yield words
        if not found:
            raise InputError(f"text: expected at least one word in {str(path)!r}, got none")


def default_cutoffs(words: int) -> list[int]:
    """Cutoffs of an adaptive softmax over so many words: the paper's that are below, or half of the words where none is."""
    return [cutoff for cutoff in CUTOFFS if cutoff < words] or [words // 2]


class Lines(IterableDataset[list[int]]):
    """Sentences as numbers between two boundary marks, over and over in the order of the files: the n-th is always the same, so
    that a run that goes on skips those that it has seen. A sentence of more than max_length words comes in pieces."""

    def __init__(self, paths: Sequence[Path], vocabulary: Vocabulary, max_length: int, *, once: bool = False) -> None:
        self.paths, self.vocabulary, self.max_length, self.once = list(paths), vocabulary, max_length, once

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            for words in read_sentences(self.paths):
                for start in range(0, len(words), self.max_length):
                    yield [1, *self.vocabulary.numbers(words[start : start + self.max_length]), 1]
            if self.once:
                return


def collate(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The keyword arguments of `LanguageModels.forward`, on the CPU."""
    cpu = torch.device("cpu")
    return {"words": pad(rows, 0, cpu), "mask": pad([[1] * len(row) for row in rows], 0, cpu).bool()}


def train(
    models: LanguageModels,
    lines: Lines,
    arguments: TrainingArguments,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Trains both directions in place; returns what the Trainer logged: loss (the mean of both directions) and perplexity.

    arguments: of Hugging Face's Trainer; max_steps must be set. resume: go on from the last checkpoint in its output_dir, where
    there is one; the weights are in the end those of the run that was not interrupted. Raises InputError: max_steps not set.
    """
    if arguments.max_steps < 1:
        raise InputError(f"steps: expected at least 1, got {arguments.max_steps}")
    trainer = _Trainer(models, arguments, progress, callbacks=[], train_dataset=lines, data_collator=collate)
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(arguments.output_dir))) if resume else None)
    return list(trainer.state.log_history)


def run(
    models: LanguageModels,
    lines: Lines,
    folder: Path,
    device: str,
    *,
    progress: Progress | None = None,
    **arguments: Any,
) -> tuple[list[dict[str, Any]], float]:
    """Trains in place, with checkpoints in the folder, from which it goes on, and which is removed at the end. arguments: of
    `ldnet_arguments`. Returns the log and the seconds."""
    start = time.perf_counter()
    found = ldnet_arguments(folder, device, lr_scheduler_type="linear", **arguments)
    log = train(models, lines, found, resume=True, progress=progress)
    shutil.rmtree(folder, ignore_errors=True)
    return log, time.perf_counter() - start


@torch.inference_mode()
def perplexity(models: LanguageModels, rows: Iterable[Sequence[int]], batch_size: int = 32) -> tuple[float, float]:
    """Perplexity of the forward and of the backward model on sentences, as `Lines` has them, in eval mode; the sentence's other
    boundary is predicted too. The models are left in the mode that they were in. Raises InputError: no sentence."""
    device, training = model_device(models), models.training
    sums, count, rows = torch.zeros(2, dtype=torch.float64), 0, iter(rows)
    models.eval()
    try:
        while batch := list(islice(rows, batch_size)):
            found = models.losses(**{name: tensor.to(device) for name, tensor in collate(batch).items()})
            sums += torch.stack([each.double().sum() for each in found]).cpu()
            count += len(found[0])
    finally:
        models.train(training)
    if not count:
        raise InputError("text: expected at least one sentence, got none")
    ahead, back = (sums / count).exp().tolist()
    return ahead, back


class _Trainer(QuietTrainer):
    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        more = {"perplexity": math.exp(logs["loss"])} if "loss" in logs else {}
        super().log({**logs, **more}, *arguments, **options)
