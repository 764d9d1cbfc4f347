"""Estimate how long a corpus takes, from a sample that is scored as the run would score it. Nothing is written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from secateur.corpus.pipeline import Runner, scored
from secateur.corpus.run import RunOptions, sample_of, settled, tuning_of
from secateur.corpus.shards import Reading
from secateur.corpus.sources import Row, Source
from secateur.corpus.tuning import Say
from secateur.corpus.windows import Window, windows
from secateur.support.errors import InputError

# Each model scores the sample so often, and the slowest one takes about so many seconds each time.
ROUNDS, SECONDS = 5, 4.0
_CHUNK, _FEWEST = 64, 64  # Rows that are encoded at a time, and the fewest rows of a sample.


@dataclass(frozen=True)
class Estimate:
    """How long a model takes to score a corpus.

    Attributes:
        documents_per_second: The median over the rounds.
        documents: About how many documents the corpus has; None means unknown.
        slower: How many times as long the other models of the same estimate take, the median over the rounds; 1 for itself.
        settings: How the model was run, from `tuning_of`.
        measured: The measurements of how it runs fastest.
    """

    documents_per_second: float
    documents: float | None
    slower: list[float]
    settings: dict[str, Any]
    measured: list[str]

    @property
    def hours(self) -> float | None:
        """The hours that the corpus takes; None where its size is unknown."""
        return None if self.documents is None else self.documents / self.documents_per_second / 3600


def estimate(
    runners: Sequence[Runner], sources: Sequence[Source], reading: Reading, options: RunOptions, say: Say
) -> tuple[list[Estimate], int]:
    """Score a random part of a corpus's first rows with models in turn, from the rows to the scores.

    Args:
        runners: The models.
        sources: The corpus.
        reading: How it is read.
        options: How the models are to be run, as in a run.
        say: Called with a line about each measurement.

    Returns:
        The estimate of each model, and how many rows were scored.

    Raises:
        InputError: As in `settled`, or the corpus has no row that can be scored.
    """
    ready, measured, sample = list[Runner](), list[list[str]](), None
    for runner in runners:
        lines: list[str] = []

        def note(line: str, lines: list[str] = lines) -> None:
            lines.append(line)
            say(line)

        chosen, read = settled(runner, options, sources, reading, note, say)
        sample = sample or read  # Each model reads the same rows.
        ready.append(chosen)
        measured.append(lines)
    sample = sample or sample_of(sources, reading, ready[0])
    if not sample.items:
        raise InputError("data: expected documents that can be scored, got none among the first")
    rows = [sample.rows[k] for k in np.random.default_rng(0).permutation(len(sample.rows))]
    for _ in range(2):  # The first pass of a model is slower, and is not used.
        slowest = min(documents_a_second(runner, rows[:_FEWEST], reading) for runner in ready)
    rows = rows[: max(_FEWEST, int(slowest * SECONDS))]
    speeds = np.array(
        [[documents_a_second(runner, rows, reading) for runner in ready] for _ in range(ROUNDS)]
    )  # [rounds, models]
    estimates = [
        Estimate(
            statistics.median(speeds[:, k]), sample.corpus_rows, np.median(speeds[:, [k]] / speeds, 0).tolist(),
            tuning_of(runner), measured[k],
        )
        for k, runner in enumerate(ready)
    ]  # fmt: skip
    return estimates, len(rows)


def documents_a_second(runner: Runner, rows: Sequence[Row], reading: Reading) -> float:
    """Return how many rows a runner encodes and scores in a second, from the moment when it is ready."""
    labels, began = len(runner.task.label_names(runner.model)), 0.0

    def events() -> Iterator[Window]:
        nonlocal began
        began = time.perf_counter()
        chunks = [(rows[first : first + _CHUNK], 1.0) for first in range(0, len(rows), _CHUNK)]
        bounds: dict[str, Any] = {"max_tokens": runner.max_tokens, "on_long": reading.on_long}
        yield from windows(chunks, runner.task, runner.model, labels, **bounds)

    count = sum(len(window.reasons) for window in scored(events(), replace(runner)))
    return count / (time.perf_counter() - began)
