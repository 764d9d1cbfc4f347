"""The claims of the paper on attribution-based pruning, and whether they hold in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from secateur.reproduction.ap.grid import STACKS, Settings
from secateur.reproduction.ap.results import Results
from secateur.reproduction.shared.claim import Claim, Estimate, averaged, combined

# The pruning rate of each stack at which the paper compares the criteria.
RATE = {"encoder": 0.3, "decoder": 0.4}
NAMES = {"fpp": "mean activation (FPP)", "random": "random units", "svd": "SVD"}
PAPER = {
    ("encoder", "fpp"): "SST-2 .908 against .784, QNLI .870 against .488, MRPC .808 against .435",
    ("encoder", "random"): "SST-2 .908 against .667, QNLI .870 against .495, MRPC .808 against .470",
    ("encoder", "svd"): "SST-2 .908 against .750, QNLI .870 against .580, MRPC .808 against .474",
    ("decoder", "fpp"): "SST-2 .938 against .938, QNLI .924 against .789, MRPC .838 against .665",
    ("decoder", "random"): "SST-2 .938 against .869, QNLI .924 against .500, MRPC .838 against .665",
    ("decoder", "svd"): "SST-2 .938 against .925, QNLI .924 against .721, MRPC .838 against .665",
}


def claims(results: Results, settings: Settings) -> list[Claim]:
    """Check the paper's claims that the run's experiments are about.

    Args:
        results: The finished cells.
        settings: The run's settings.

    Returns:
        The claims, with the paper's and the run's figures.

    References:
        Yang et al. 2023, arXiv 2205.04157.
    """
    checks: list[Callable[[Results, Settings], Iterator[Claim]]] = []
    if "accuracy" in settings.experiments:
        checks += [_beats_other_criteria, _random_targets_are_close, _decoder_is_robust, _encoder_falls_off]
    if "low-resource" in settings.experiments:
        checks.append(_few_examples_suffice)
    if "unsupervised" in settings.experiments:
        checks.append(_labels_are_not_needed)
    if "unseen" in settings.experiments:
        checks.append(_related_task_is_better)
    return [claim for check in checks for claim in check(results, settings)]


def _beats_other_criteria(results: Results, settings: Settings) -> Iterator[Claim]:
    """Check that AP beats the other criteria on each stack."""
    for stack in STACKS:
        for other, name in NAMES.items():
            if {"ap", other} <= set(settings.criteria):
                ours, theirs = (_mean(results, settings.tasks, stack, RATE[stack], c) for c in ("ap", other))
                text = (
                    f"{stack} at p = {RATE[stack]}: attribution (AP) keeps more accuracy than {name}, as a mean over the tasks"
                )
                yield _more(text, PAPER[stack, other], f"{ours.value:.3f} against {theirs.value:.3f}", ours, theirs)


def _random_targets_are_close(results: Results, settings: Settings) -> Iterator[Claim]:
    """Check that attribution towards random targets comes close to AP."""
    if {"ap", "rap"} <= set(settings.criteria):
        ours, theirs = (_mean(results, settings.tasks, "encoder", 0.3, criterion) for criterion in ("ap", "rap"))
        between = combined([(1, ours), (-1, theirs)])
        yield Claim(
            "encoder at p = 0.3: attribution towards random word-pieces (RAP) comes close to AP, within .051 (its worst task)",
            "SST-2 .908 and .872, QNLI .870 and .819, MRPC .808 and .801",
            f"{ours.value:.3f} and {theirs.value:.3f}",
            abs(ours.value - theirs.value) <= 0.051,
            not (between.reaches(0.051) or between.reaches(-0.051)),
        )


def _decoder_is_robust(results: Results, settings: Settings) -> Iterator[Claim]:
    """Check that the decoder loses less than the encoder, and little."""
    encoder, decoder = (_mean(results, settings.tasks, stack, 0.4, "ap") for stack in STACKS)
    yield _more(
        "at p = 0.4 a pruned decoder keeps more accuracy than a pruned encoder, as a mean over the tasks",
        "six tasks: .816 and .701",
        f"{decoder.value:.3f} and {encoder.value:.3f}",
        decoder,
        encoder,
    )
    lost = {
        task: combined([(1, results.dense_mean(task).estimate), (-1, _mean(results, [task], "decoder", 0.4, "ap"))])
        for task in settings.tasks
    }
    worst = max(lost, key=lambda task: lost[task].value)
    yield Claim(
        "a decoder loses little up to p = 0.4: at most .03 on each task",
        "at most .026 (MRPC)",
        f"at most {lost[worst].value:.3f} ({worst})",
        lost[worst].value <= 0.03,
        not lost[worst].reaches(0.03),
    )


def _encoder_falls_off(results: Results, settings: Settings) -> Iterator[Claim]:
    """Check that the encoder's accuracy falls off beyond p = 0.3."""
    tasks = settings.tasks
    dense = combined([(1 / len(tasks), results.dense_mean(task).estimate) for task in tasks])
    at_early, at_late = (_mean(results, tasks, "encoder", rate, "ap") for rate in (0.3, 0.5))
    early, late = dense.value - at_early.value, dense.value - at_late.value
    yield Claim(
        "the encoder falls off beyond p = 0.3: at 0.5 it has lost more than twice as much",
        "six tasks: .816 less .065 and less .218",
        f"{dense.value:.3f} less {early:.3f} and less {late:.3f}",
        late > 2 * early,
        not combined([(-1, dense), (2, at_early), (-1, at_late)]).reaches(0.0),  # late - 2 early
    )


def _few_examples_suffice(results: Results, settings: Settings) -> Iterator[Claim]:
    """Check that scores of few examples are nearly as good."""
    few, means = min(settings.sizes), {}
    for examples in (0, few):  # 0 stands for all examples.
        of_tasks = [
            averaged([_mean(results, [task], stack, 0.5, "ap", examples=examples) for stack in STACKS])
            for task in settings.detailed
        ]
        means[examples] = combined([(1 / len(of_tasks), of_task) for of_task in of_tasks])
    yield Claim(
        f"{few} examples are nearly as good as all for the scores: within .05 at p = 0.5, as a mean over tasks and stacks",
        "10 against all: SST-2 encoder .807 and .841, QNLI decoder .741 and .777",
        f"{means[few].value:.3f} and {means[0].value:.3f}",
        means[few].value >= means[0].value - 0.05,
        not combined([(1, means[few]), (-1, means[0])]).reaches(-0.05),
    )


def _labels_are_not_needed(results: Results, settings: Settings) -> Iterator[Claim]:
    """Check that scores without labels are no worse."""
    with_labels, without = (
        averaged([_mean(results, settings.tasks, stack, rate, name) for stack in STACKS for rate in settings.rates])
        for name in ("ap", "ap-unsupervised")
    )
    yield Claim(
        "scores need no labels: without them the accuracy is no lower, as a mean over tasks, stacks and rates",
        "mixed: QNLI decoder at 0.5 .926 without and .777 with, SST-2 decoder at 0.9 .806 and .924",
        f"{without.value:.3f} without, {with_labels.value:.3f} with",
        without.value >= with_labels.value,
        not without.overlaps(with_labels),
    )


def _related_task_is_better(results: Results, settings: Settings) -> Iterator[Claim]:
    """Check that a related task's scores are better than an unrelated one's."""
    tested, related, unrelated = settings.unseen
    paper = {"encoder": "QNLI with scores of RTE .770, of SST-2 .680", "decoder": "QNLI with scores of RTE .920, of SST-2 .505"}
    for stack, rate in (("encoder", 0.3), ("decoder", 0.5)):
        near, far = (_mean(results, [tested], stack, rate, "ap", scored=scored) for scored in (related, unrelated))
        yield _more(
            f"{stack} at p = {rate}: on a task without examples, a related task's scores are better than an unrelated one's",
            paper[stack],
            f"{tested} with scores of {related} {near.value:.3f}, of {unrelated} {far.value:.3f}",
            near,
            far,
        )


def _more(text: str, paper: str, ours: str, more: Estimate, less: Estimate) -> Claim:
    """The claim that one accuracy is above another."""
    return Claim(text, paper, ours, more.value > less.value, not more.overlaps(less))


def _mean(results: Results, tasks: Sequence[str], stack: str, rate: float, criterion: str, **cell: Any) -> Estimate:
    """Compute the mean accuracy over the tasks with one stack pruned. The tasks are tested on different examples."""
    means = [results.at(**{"scored": task, "tested": task, "criterion": criterion, stack: rate, **cell}) for task in tasks]
    finished = [mean.estimate for mean in means if mean is not None]
    return combined([(1 / len(finished), estimate) for estimate in finished])
