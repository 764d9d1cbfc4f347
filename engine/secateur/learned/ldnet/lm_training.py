"""Training of the language models on text files with Hugging Face's Trainer, and their perplexity."""

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
from secateur.support.errors import InputError
from secateur.support.progress import Progress
from secateur.support.trainer import QuietTrainer
from secateur.tasks.batches import model_device, pad

# The adaptive softmax's cutoffs in the paper's code. Only those below the number of words are used.
CUTOFFS = (4000, 40000, 200000)


def read_sentences(paths: Sequence[Path]) -> Iterator[list[str]]:
    """Yield the words of each line that is not empty, file after file.

    Args:
        paths: Text files in UTF-8.

    Yields:
        The words of a line, separated by white space in the file.

    Raises:
        InputError: A file cannot be read, is not UTF-8 (the message names the line), or has no word.
    """
    for path in paths:
        has_words = False
        for _, line in numbered_lines(path):
            words = line.split()
            if words:
                has_words = True
                yield words
        if not has_words:
            raise InputError(f"text: expected at least one word in {str(path)!r}, got none")


def default_cutoffs(words: int) -> list[int]:
    """Return the adaptive softmax's cutoffs for a vocabulary of `words` words.

    They are the paper's cutoffs below `words`, or half of `words` if no cutoff is below.
    """
    return [cutoff for cutoff in CUTOFFS if cutoff < words] or [words // 2]


class Lines(IterableDataset[list[int]]):
    """Sentences as word numbers between two boundary marks, in the order of the files.

    The files are read again and again unless `once` is set. The n-th sentence is always the same, so a resumed run can skip
    the sentences that it has already seen.

    Args:
        paths: Text files in UTF-8, a sentence in each line.
        vocabulary: The vocabulary that gives the numbers.
        max_length: The largest number of words in a sentence. Longer sentences are split.
        once: Read the files once only.
    """

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
    """Turn rows of `Lines` into keyword arguments of `LanguageModels.forward`, on the CPU.

    Args:
        rows: Word numbers of each sentence, with its boundary marks.

    Returns:
        "words", int64 [B, T], padded with 0, and "mask", bool [B, T], True at words and marks.
    """
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
    """Train both language models in place.

    Args:
        models: The language models.
        lines: The sentences.
        arguments: Hugging Face's TrainingArguments, with max_steps set.
        resume: Continue from the last checkpoint in arguments.output_dir, if there is one. The final weights are the same as
            those of an uninterrupted run.
        progress: True for a progress bar, or a function of (steps done, all steps).

    Returns:
        The Trainer's log, with the loss (the mean of both directions) and its perplexity.

    Raises:
        InputError: max_steps is not set.
    """
    if arguments.max_steps < 1:
        raise InputError(f"steps: expected at least 1, got {arguments.max_steps}")
    trainer = _Trainer(models, arguments, progress, callbacks=[], train_dataset=lines, data_collator=collate)
    return trainer.run(resume=resume)


def run(
    models: LanguageModels,
    lines: Lines,
    folder: Path,
    device: str,
    *,
    progress: Progress | None = None,
    **arguments: Any,
) -> tuple[list[dict[str, Any]], float]:
    """Train both language models in place, with checkpoints.

    Args:
        models: The language models.
        lines: The sentences.
        folder: The checkpoints' folder. Training continues from its last checkpoint, and removes the folder at the end.
        device: The device's name; "cpu" makes the Trainer use the CPU.
        progress: True for a progress bar, or a function of (steps done, all steps).
        arguments: Further values of `ldnet_arguments`.

    Returns:
        The Trainer's log, and the time in seconds.

    Raises:
        InputError: As in `train` and `ldnet_arguments`.
    """
    start = time.perf_counter()
    trainer_arguments = ldnet_arguments(folder, device, lr_scheduler_type="linear", **arguments)
    log = train(models, lines, trainer_arguments, resume=True, progress=progress)
    shutil.rmtree(folder, ignore_errors=True)
    return log, time.perf_counter() - start


@torch.inference_mode()
def perplexity(models: LanguageModels, rows: Iterable[Sequence[int]], batch_size: int = 32) -> tuple[float, float]:
    """Compute the perplexities of the forward and of the backward model in eval mode.

    The boundary mark at the far end of a sentence is predicted too. The models keep the mode that they were in.

    Args:
        models: The language models.
        rows: Sentences as `Lines` yields them.
        batch_size: The number of sentences in a forward pass.

    Returns:
        The perplexity of the forward model and that of the backward model.

    Raises:
        InputError: There is no sentence.
    """
    device, training = model_device(models), models.training
    sums, count, rows = torch.zeros(2, dtype=torch.float64), 0, iter(rows)
    models.eval()
    try:
        while batch := list(islice(rows, batch_size)):
            losses = models.losses(**{name: tensor.to(device) for name, tensor in collate(batch).items()})
            sums += torch.stack([direction_losses.double().sum() for direction_losses in losses]).cpu()
            count += len(losses[0])
    finally:
        models.train(training)
    if not count:
        raise InputError("text: expected at least one sentence, got none")
    ahead, back = (sums / count).exp().tolist()
    return ahead, back


class _Trainer(QuietTrainer):
    """A Trainer that also logs the perplexity."""

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add the perplexity to logs that hold a loss."""
        more = {"perplexity": math.exp(logs["loss"])} if "loss" in logs else {}
        super().log({**logs, **more}, *arguments, **options)
