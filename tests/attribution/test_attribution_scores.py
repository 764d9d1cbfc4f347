"""Scores from attribution, from which movement pruning may start: they equal a loop over entries, and leave the model whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from encoders import GRANULARITIES, TASKS, encoder, examples, inputs, pair_tokenizer, same, state, still_encoder, weights
from torch import Tensor

from secateur import InputError
from secateur.learned.multitask.model import MultitaskModel
from secateur.learned.multitask.parametrizations import Granularity
from secateur.learned.multitask.pruning import MultitaskPruning, attribution_scores, magnitude_scores
from secateur.learned.multitask.run import TaskData, scores_from
from secateur.learned.multitask.training import collate


def batches(model: MultitaskModel, count: int = 3) -> list[dict[str, Any]]:
    """Return batches of one example, of all tasks."""
    collated, rows = [], examples(count)
    for name, task in TASKS.items():
        for feature in task.features(pair_tokenizer(), rows[name], 24):
            collated.append(collate(model, 0, name, [feature]))
    return collated


def by_movement(granularity: Granularity, **options: Any) -> MultitaskPruning:
    return MultitaskPruning(still_encoder().double(), TASKS, granularity=granularity, density=0.5, **options)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ranks_of_the_sums_of_absolute_gradients_times_entries(granularity: Granularity, scale: float) -> None:
    pruning = by_movement(granularity)
    one_example_batches = batches(pruning)
    actual = attribution_scores(pruning, one_example_batches, scale=scale)
    # Ordinary gradients of the same entries, in a model by magnitude without masks.
    plain = MultitaskPruning(still_encoder().double(), TASKS, granularity=granularity, density=1.0, method="magnitude").eval()
    entries = {path: held[0 if granularity == "element" else 1] for path, held in weights(plain).items()}
    sums = {path: torch.zeros_like(entry).detach() for path, entry in entries.items()}
    for batch in one_example_batches:
        plain.zero_grad()
        plain(**batch).loss.backward()
        for path, entry in entries.items():
            sums[path] += (entry.grad * entry).detach().abs()  # type: ignore[operator]
    values = sorted((float(value), path, k) for path, of_path in sums.items() for k, value in enumerate(of_path.flatten()))
    flat = {path: of_path.flatten() for path, of_path in actual.items()}
    assert sorted(float(score) for of_path in flat.values() for score in of_path) == pytest.approx(
        [scale * rank / (len(values) - 1) for rank in range(len(values))], abs=1e-6
    )
    assert {path: of_path.shape for path, of_path in actual.items()} == {path: entry.shape for path, entry in entries.items()}
    # The order is that of the sums. Two sums that differ by less than rounding may come in either order.
    ordered = torch.tensor([value for value, _, _ in values])
    scores = torch.tensor([float(flat[path][k]) for _, path, k in values])
    swapped = (scores.diff() <= 0).nonzero().flatten()
    assert all(ordered[k + 1] - ordered[k] < 1e-12 * ordered[-1] for k in swapped)
    assert len(swapped) < 0.02 * len(scores)


def test_pruned_entries_are_scored_as_if_they_were_there() -> None:
    pruning = by_movement("element")
    dense = attribution_scores(pruning, batches(pruning))
    for mask in pruning.masks.values():
        mask.keep_(torch.arange(mask.entries) % 2 == 0)
    assert same(attribution_scores(pruning, batches(pruning)), dense)


class Broken(Exception):
    """Raised in place of the second batch."""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_model_is_left_as_it_was(granularity: Granularity, fails: bool) -> None:
    """Weights, scores, masks, the mode of each module, and no gradient; also after an exception in the middle."""
    pruning = by_movement(granularity)
    pruning.update_masks_(1, 1)
    pruning.train()
    pruning.encoder.eval()
    pruning.heads["size"].requires_grad_(False)
    before, modes = state(pruning), {name: module.training for name, module in pruning.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in pruning.named_parameters()}

    def interrupted_batches() -> Iterator[dict[str, Any]]:
        yield batches(pruning)[0]
        if fails:
            raise Broken

    if fails:
        with pytest.raises(Broken):
            attribution_scores(pruning, interrupted_batches())
    else:
        attribution_scores(pruning, interrupted_batches())
    assert same(state(pruning), before)
    assert {name: module.training for name, module in pruning.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in pruning.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in pruning.parameters())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_movement_starts_from_the_scores(granularity: Granularity) -> None:
    first = by_movement(granularity)
    scores = attribution_scores(first, batches(first))
    pruning = by_movement(granularity, initial_scores=scores)
    assert all(
        torch.equal(mask.scores.detach(), scores[path]) for path, mask in pruning.masks.items() if mask.scores is not None
    )
    pruning.update_masks_(1, 1)
    # The entries with the highest scores stay.
    kept, removed = [], []
    for path, mask in pruning.masks.items():
        is_kept = torch.ones(mask.entries, dtype=torch.bool) if mask.mask is None else mask.mask
        kept.append(scores[path].flatten()[is_kept])
        removed.append(scores[path].flatten()[~is_kept])
    assert torch.cat(kept).min() > torch.cat(removed).max()
    before = {path: of_path.clone() for path, of_path in scores.items()}
    with torch.no_grad():
        for mask in pruning.masks.values():
            mask.scores.zero_()  # type: ignore[union-attr]
    assert same(scores, before)  # The pruning has copied the scores.


def shapes() -> dict[str, Tensor]:
    return {path: torch.zeros(mask.shape) for path, mask in by_movement("element").masks.items()}


def without_the_last() -> dict[str, Tensor]:
    return dict(list(shapes().items())[:-1])


def transposed() -> dict[str, Tensor]:
    return {path: of_path.t() for path, of_path in shapes().items()}


def data() -> dict[str, TaskData]:
    return {name: TaskData(TASKS[name], rows, []) for name, rows in examples().items()}


def from_model(encoder_kind: Any, model: Any, tasks: dict[str, Any]) -> Any:
    trained = MultitaskModel(model, tasks)
    return scores_from(trained, encoder_kind, pair_tokenizer(), data(), granularity="element", max_length=24)


BAD: dict[str, tuple[Any, str]] = {
    "by magnitude": (
        lambda: MultitaskPruning(still_encoder(), TASKS, method="magnitude", initial_scores=shapes()),
        r"^initial_scores: expected them with method 'movement', got 'magnitude'$",
    ),
    "one is missing": (
        lambda: by_movement("element", initial_scores=without_the_last()),
        r"^initial_scores: expected 'encoder.layer.1.output.dense' of shape \[16, 24\], got None$",
    ),
    "of elements": (
        lambda: by_movement("rank", initial_scores=shapes()),
        r"^initial_scores: expected 'encoder.layer.0.attention.self.query' of shape \[16\], got \[16, 16\]$",
    ),
    "transposed": (
        lambda: by_movement("element", initial_scores=transposed()),
        r"^initial_scores: expected 'encoder.layer.0.intermediate.dense' of shape \[24, 16\], got \[16, 24\]$",
    ),
    "attribution by magnitude": (
        lambda: attribution_scores(MultitaskPruning(still_encoder(), TASKS, method="magnitude"), []),
        r"^pruning: expected method 'movement', got 'magnitude'$",
    ),
    "no batches": (lambda: attribution_scores(by_movement("rank"), []), r"^batches: expected at least one, got none$"),
    "of another encoder": (
        lambda: from_model(still_encoder(), encoder("bert-sequence"), TASKS),
        r"^initial_scores: expected a model whose encoder has the same shapes, got other shapes$",
    ),
    "of other tasks": (
        lambda: from_model(still_encoder(), still_encoder(), {"mood": TASKS["mood"]}),
        r"^initial_scores: expected a model of the tasks \{\"mood\": .*\"where\": .*, got \{\"mood\": ",
    ),
    "method": (
        lambda: MultitaskPruning(still_encoder(), TASKS, method="luck"),  # type: ignore[arg-type]
        r"^method: expected magnitude or movement, got",
    ),
    "granularity": (
        lambda: MultitaskPruning(still_encoder(), TASKS, granularity="head"),  # type: ignore[arg-type]
        r"^granularity: expected element or rank, got 'head'$",
    ),
    "scope": (lambda: MultitaskPruning(still_encoder(), TASKS, scope="all"), r"^scope: expected global or local, got 'all'$"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BAD)
def test_scores_and_settings_that_do_not_fit(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(InputError, match=message):
        call()


def test_scores_from_a_trained_model_are_of_its_first_examples() -> None:
    trained = MultitaskModel(still_encoder().double(), TASKS, seed=3).eval()
    actual = scores_from(trained, still_encoder(), pair_tokenizer(), data(), granularity="rank", max_length=24)
    pruning = by_movement("rank")
    pruning.heads.load_state_dict(trained.heads.state_dict())
    assert same(actual, attribution_scores(pruning, batches(pruning, count=12)))
    assert not any("parametrizations" in name for name, _ in trained.named_modules())
    with torch.no_grad():
        assert torch.isfinite(trained("mood", **inputs()).logits).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scores_by_magnitude_are_the_ranks_of_absolute_values(granularity: Granularity) -> None:
    """Over all matrices together, from 0 to the scale."""
    pruning = by_movement(granularity)
    actual = magnitude_scores(pruning, scale=2.0)
    entries = {path: held[0 if granularity == "element" else 1] for path, held in weights(pruning).items()}
    assert {path: of_path.shape for path, of_path in actual.items()} == {path: entry.shape for path, entry in entries.items()}
    pairs = [
        (abs(float(value)), float(score))
        for path, of_path in entries.items()
        for value, score in zip(of_path.detach().flatten(), actual[path].flatten(), strict=True)
    ]
    scores = [score for _, score in sorted(pairs)]
    assert scores == sorted(scores)
    assert (scores[0], scores[-1]) == (0.0, 2.0)
