"""The claims of the paper on LD-Net, and whether they hold in a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from secateur.reproduction.ldnet.grid import NO_LM, WITH_DROPOUT, WITHOUT_DROPOUT, Cell
from secateur.reproduction.ldnet.results import Results
from secateur.reproduction.shared.claim import Claim, combined

# A loss of up to so many points of F1 counts as no loss. The paper's own losses are .19 and .49.
TOLERATED = 0.5
# The least factor by which FLOPs must shrink, and the least share of the speed-up implied by the FLOPs.
SHRINKAGE, OF_IMPLIED = 5.0, 0.85


def claims(results: Results) -> list[Claim]:
    """Check the paper's claims for each task, at the smallest number of layers wanted.

    Args:
        results: The finished cells.

    Returns:
        The claims, with the paper's and the run's figures.

    References:
        Liu et al. 2018, arXiv 1804.07827.
    """
    checks = (
        _lm_helps, _wanted_is_reached, _loss_is_small, _loss_against_control, _dropout_helps_pruning,
        _dropout_helps_detaching, _flops_shrink, _speed_follows_flops,
    )  # fmt: skip
    return [claim for task in results.settings.columns for check in checks for claim in check(results, task)]


def _lm_helps(results: Results, task: str) -> Iterator[Claim]:
    """Check that language models help a tagger."""
    scores = {lm: results.estimate(Cell(lm, task)) for lm in (WITH_DROPOUT, WITHOUT_DROPOUT, NO_LM)}
    ours, plain = scores[WITH_DROPOUT], scores[NO_LM]
    yield Claim(
        f"{task}: a tagger on the whole language models (with layer dropout) is better than one without any",
        "entities 92.03 against 90.78, chunks 96.15 against 94.42",
        f"{ours.value:.2f} against {plain.value:.2f} (without layer dropout {scores[WITHOUT_DROPOUT].value:.2f})",
        ours.value > plain.value,
        not ours.overlaps(plain),
    )


def _wanted_is_reached(results: Results, task: str) -> Iterator[Claim]:
    """Check that the penalty closes as many layers as wanted."""
    wanted = results.settings.wanted[0]
    left = {lm: int(results.row(Cell(lm, task, wanted))["layers"]) for lm in (WITH_DROPOUT, WITHOUT_DROPOUT)}
    yield Claim(
        f"{task}: R3 closes all but {wanted} of {2 * results.settings.layers} layers, or more, with and without layer dropout",
        "2 wanted, 51 MFLOPs a word down to 5 and to 13",
        f"{left[WITH_DROPOUT]} left with, {left[WITHOUT_DROPOUT]} without",
        max(left.values()) <= wanted,
    )


def _loss_is_small(results: Results, task: str) -> Iterator[Claim]:
    """Check that pruning costs little."""
    cell = Cell(WITH_DROPOUT, task, results.settings.wanted[0])
    loss = results.loss(cell)
    yield Claim(
        f"{task}: the pruned tagger (with layer dropout) loses at most {TOLERATED:g} points",
        "entities 92.03 to 91.84, chunks 96.15 to 95.66",
        f"{results.score(Cell(WITH_DROPOUT, task)):.2f} to {results.score(cell):.2f}",
        loss.value <= TOLERATED,
        not loss.reaches(TOLERATED),
    )


def _loss_against_control(results: Results, task: str) -> Iterator[Claim]:
    """Compare with a control, if the run has one: a tagger that was trained for as long and may keep all layers."""
    everything = 2 * results.settings.layers
    wanted = results.settings.wanted[0]
    if everything in results.settings.wanted and wanted < everything:
        whole, pruned = (results.estimate(Cell(WITH_DROPOUT, task, number)) for number in (everything, wanted))
        loss = combined([(1, whole), (-1, pruned)])
        yield Claim(
            f"{task}: it loses at most {TOLERATED:g} points also against a tagger with all layers that is trained for as long",
            "not in the paper",
            f"{whole.value:.2f} and {pruned.value:.2f}",
            loss.value <= TOLERATED,
            not loss.reaches(TOLERATED),
        )


def _dropout_helps_pruning(results: Results, task: str) -> Iterator[Claim]:
    """Check that pruning costs less with layer dropout."""
    losses = {lm: results.loss(Cell(lm, task, results.settings.wanted[0])) for lm in (WITH_DROPOUT, WITHOUT_DROPOUT)}
    yield Claim(
        f"{task}: pruning costs less with layer dropout than without",
        "entities 0.19 against 0.40 points, chunks 0.49 against 0.67",
        f"{losses[WITH_DROPOUT].value:.2f} against {losses[WITHOUT_DROPOUT].value:.2f}",
        losses[WITH_DROPOUT].value < losses[WITHOUT_DROPOUT].value,
        not losses[WITH_DROPOUT].overlaps(losses[WITHOUT_DROPOUT]),
    )


def _dropout_helps_detaching(results: Results, task: str) -> Iterator[Claim]:
    """Check that deleting random layers costs less with layer dropout."""
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


def _flops_shrink(results: Results, task: str) -> Iterator[Claim]:
    """Check that the FLOPs shrink by a large factor."""
    whole, cell = Cell(WITH_DROPOUT, task), Cell(WITH_DROPOUT, task, results.settings.wanted[0])
    before, after = results.row(whole)["flops"] / 1e6, results.row(cell)["flops"] / 1e6
    yield Claim(
        f"{task}: FLOPs a word shrink {SHRINKAGE:g} times or more",
        "entities 51 to 5 MFLOPs, chunks 51 to 10",
        f"{before:.2f} to {after:.2f} MFLOPs, {results.shrinkage(cell):.1f} times",
        results.shrinkage(cell) >= SHRINKAGE,
    )


def _speed_follows_flops(results: Results, task: str) -> Iterator[Claim]:
    """Check that the speed-up comes close to the FLOPs' factor."""
    cell = Cell(WITH_DROPOUT, task, results.settings.wanted[0])
    row, implied = results.row(cell), results.shrinkage(cell)
    yield Claim(
        f"{task}: words a second rise by at least {OF_IMPLIED:.0%} of the factor that the FLOPs imply",
        "entities 26k to 98k on a GPU, 3.7 times of 10",
        f"{row['whole_words_per_second']:,.0f} to {row['words_per_second']:,.0f}, {row['speedup']:.1f} times of {implied:.1f}",
        row["speedup"] >= OF_IMPLIED * implied,
    )
