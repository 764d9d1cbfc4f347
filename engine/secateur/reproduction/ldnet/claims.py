"""What the paper on LD-Net found, and whether it held in a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from secateur.reproduction.ldnet.grid import NO_LM, WITH_DROPOUT, WITHOUT_DROPOUT, Cell
from secateur.reproduction.ldnet.results import Results
from secateur.reproduction.shared.claim import Claim

# Points of F1, the largest loss that counts as none; the paper's own are .19 and .49.
TOLERATED = 0.5
SHRINKAGE, OF_IMPLIED = 5.0, 0.85


def claims(results: Results) -> list[Claim]:
    """Of each task, for the smallest number of layers that was wanted."""
    made = (_lm_helps, _wanted, _small_loss, _against_control, _dropout, _detachable, _flops, _speed)
    return [claim for task in results.settings.columns for each in made for claim in each(results, task)]


def _lm_helps(results: Results, task: str) -> Iterator[Claim]:
    scores = {lm: results.score(Cell(lm, task)) for lm in (WITH_DROPOUT, WITHOUT_DROPOUT, NO_LM)}
    yield Claim(
        f"{task}: a tagger on the whole language models (with layer dropout) is better than one without any",
        "entities 92.03 against 90.78, chunks 96.15 against 94.42",
        f"{scores[WITH_DROPOUT]:.2f} against {scores[NO_LM]:.2f} (without layer dropout {scores[WITHOUT_DROPOUT]:.2f})",
        scores[WITH_DROPOUT] > scores[NO_LM],
    )


def _wanted(results: Results, task: str) -> Iterator[Claim]:
    wanted = results.settings.wanted[0]
    left = {lm: int(results.row(Cell(lm, task, wanted))["layers"]) for lm in (WITH_DROPOUT, WITHOUT_DROPOUT)}
    yield Claim(
        f"{task}: R3 closes all but {wanted} of {2 * results.settings.layers} layers, or more, with and without layer dropout",
        "2 wanted, 51 MFLOPs a word down to 5 and to 13",
        f"{left[WITH_DROPOUT]} left with, {left[WITHOUT_DROPOUT]} without",
        max(left.values()) <= wanted,
    )


def _small_loss(results: Results, task: str) -> Iterator[Claim]:
    cell = Cell(WITH_DROPOUT, task, results.settings.wanted[0])
    loss = results.loss(cell)
    yield Claim(
        f"{task}: the pruned tagger (with layer dropout) loses at most {TOLERATED:g} points",
        "entities 92.03 to 91.84, chunks 96.15 to 95.66",
        f"{results.score(Cell(WITH_DROPOUT, task)):.2f} to {results.score(cell):.2f}",
        loss <= TOLERATED,
    )


def _against_control(results: Results, task: str) -> Iterator[Claim]:
    """Where the run has taggers that were trained on with all layers wanted."""
    everything = 2 * results.settings.layers
    wanted = results.settings.wanted[0]
    if everything in results.settings.wanted and wanted < everything:
        whole, pruned = (results.score(Cell(WITH_DROPOUT, task, number)) for number in (everything, wanted))
        yield Claim(
            f"{task}: so it does against a tagger that keeps all layers and is trained on for as long",
            "not in the paper",
            f"{whole:.2f} and {pruned:.2f}",
            whole - pruned <= TOLERATED,
        )


def _dropout(results: Results, task: str) -> Iterator[Claim]:
    losses = {lm: results.loss(Cell(lm, task, results.settings.wanted[0])) for lm in (WITH_DROPOUT, WITHOUT_DROPOUT)}
    yield Claim(
        f"{task}: pruning costs less with layer dropout than without",
        "entities 0.19 against 0.40 points, chunks 0.49 against 0.67",
        f"{losses[WITH_DROPOUT]:.2f} against {losses[WITHOUT_DROPOUT]:.2f}",
        losses[WITH_DROPOUT] < losses[WITHOUT_DROPOUT],
    )


def _detachable(results: Results, task: str) -> Iterator[Claim]:
    lost = {}
    for lm in (WITH_DROPOUT, WITHOUT_DROPOUT):
        (_, whole), *fewer = results.row(Cell(lm, task))["detached"]
        lost[lm] = 100 * (whole - statistics.mean(score for _, score in fewer))
    yield Claim(
        f"{task}: layers taken out at random, without any training, cost less with layer dropout, as a mean over their number",
        "not in the paper",
        f"{lost[WITH_DROPOUT]:.1f} points against {lost[WITHOUT_DROPOUT]:.1f}",
        lost[WITH_DROPOUT] < lost[WITHOUT_DROPOUT],
    )


def _flops(results: Results, task: str) -> Iterator[Claim]:
    cell = Cell(WITH_DROPOUT, task, results.settings.wanted[0])
    before, after = (results.row(each)["flops"] / 1e6 for each in (Cell(WITH_DROPOUT, task), cell))
    yield Claim(
        f"{task}: FLOPs a word shrink {SHRINKAGE:g} times or more",
        "entities 51 to 5 MFLOPs, chunks 51 to 10",
        f"{before:.2f} to {after:.2f} MFLOPs, {results.shrinkage(cell):.1f} times",
        results.shrinkage(cell) >= SHRINKAGE,
    )


def _speed(results: Results, task: str) -> Iterator[Claim]:
    cell = Cell(WITH_DROPOUT, task, results.settings.wanted[0])
    row, implied = results.row(cell), results.shrinkage(cell)
    yield Claim(
        f"{task}: words a second rise by at least {OF_IMPLIED:.0%} of what the FLOPs imply",
        "entities 26k to 98k on a GPU, 3.7 times of 10",
        f"{row['whole_words_per_second']:,.0f} to {row['words_per_second']:,.0f}, {row['speedup']:.1f} times of {implied:.1f}",
        row["speedup"] >= OF_IMPLIED * implied,
    )
