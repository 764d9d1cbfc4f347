"""Training: batches of a single task, groups of learning rates, and equality of the Trainer with a plain loop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import (
    GRANULARITIES,
    KINDS,
    METHODS,
    NAMES,
    SETTINGS,
    TASKS,
    arguments,
    encoder,
    examples,
    pair_tokenizer,
    same,
    state,
    still_encoder,
    weights,
)
from torch import Tensor, nn

from secateur import InputError
from secateur.learned.multitask.encoder_tasks import Feature
from secateur.learned.multitask.pruning import MultitaskPruning
from secateur.learned.multitask.training import LEARNING_RATES, UniformTasks, collate, evaluate_task, features_of, train

RATES = {"weights": 1e-3, "scores": 0.3, "sigma": 0.02}


def sampled(sizes: list[int], batch_size: int, batches: int, seed: int = 0) -> Iterator[tuple[int, list[int]]]:
    """Yield the task and the examples of each batch."""
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    for batch in UniformTasks(sizes, batch_size, batches, seed):
        tasks = {next(number for number, end in enumerate(ends) if row < end) for row in batch}
        (task,) = tasks  # A batch is of one task.
        assert len(batch) == batch_size
        yield task, [row - ends[task] + sizes[task] for row in batch]


def test_a_small_task_is_drawn_as_often_as_a_large_one() -> None:
    batches, sizes = 3000, [20, 20_000, 300]
    drawn = Counter(task for task, _ in sampled(sizes, 4, batches))
    # Five standard deviations of a binomial: once in a million such tests.
    assert all(abs(drawn[task] - batches / 3) < 5 * math.sqrt(batches * 2 / 9) for task in range(3))
    assert drawn.total() == batches


@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
def test_every_example_is_seen_once_before_any_is_seen_twice(batch_size: int) -> None:
    sizes = [20, 7, 1]
    seen: list[list[int]] = [[], [], []]
    for task, rows in sampled(sizes, batch_size, 400):
        seen[task] += rows
    for size, rows in zip(sizes, seen, strict=True):
        rounds = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        assert len(rounds) > 2
        assert all(sorted(order) == list(range(size)) for order in rounds)
        if size > 5:
            assert len({tuple(order) for order in rounds}) > len(rounds) / 2  # The order changes from round to round.


def test_batches_are_the_seeds() -> None:
    sampler = UniformTasks([20, 7], 4, 50, seed=3)
    assert len(sampler) == 50
    assert list(sampler) == list(sampler) == list(UniformTasks([20, 7], 4, 50, seed=3))
    assert list(sampler) == list(UniformTasks([20, 7], 4, 99, seed=3))[:50]
    assert list(sampler) != list(UniformTasks([20, 7], 4, 50, seed=4))


@pytest.mark.parametrize("sizes", [[], [5, 0]])
def test_a_task_without_examples_is_refused(sizes: list[int]) -> None:
    with pytest.raises(InputError, match=r"^sizes: expected at least one example of every task, got "):
        UniformTasks(sizes, 4, 10, 0)


@pytest.mark.parametrize("setting", SETTINGS[::2], ids=NAMES[::2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_parameter_is_in_one_group(kind: str, setting: dict[str, Any]) -> None:
    pruning = MultitaskPruning(encoder(kind), TASKS, density=0.3, **setting)
    frozen = pruning.heads["size"].get_parameter("linear.bias").requires_grad_(False)
    groups = pruning.parameter_groups(RATES, weight_decay=0.01)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in pruning.parameters()} - {id(frozen)}
    expected = {"weights"}
    scores = {id(mask.scores) for mask in pruning.masks.values() if mask.scores is not None}
    sigma = {id(held[1]) for held in weights(pruning).values()} if setting["granularity"] == "rank" else set()
    for group in groups:
        assert group["lr"] == RATES[group["name"]]
        for parameter in group["params"]:
            name = "scores" if id(parameter) in scores else "sigma" if id(parameter) in sigma else "weights"
            assert group["name"] == name
            assert group["weight_decay"] == (0.01 if name == "weights" and parameter.dim() == 2 else 0.0)
            expected.add(name)
    assert {group["name"] for group in groups} == expected
    assert len(scores) == (len(pruning.linears) if setting["method"] == "movement" else 0)


def prepared(model: nn.Module, **options: Any) -> tuple[MultitaskPruning, dict[str, list[Feature]]]:
    pruning = MultitaskPruning(model, TASKS, **{"density": 0.3, **options})
    return pruning, features_of(pruning, pair_tokenizer(), examples(), 24)


def by_hand(pruning: MultitaskPruning, features: dict[str, list[Feature]], steps: int, size: int, accumulated: int) -> None:
    """Train in a plain loop: AdamW with warm-up and clipping; the masks are chosen after each step."""
    rows = [(name, feature) for name, of_task in features.items() for feature in of_task]
    batches = iter(UniformTasks([len(of_task) for of_task in features.values()], size, steps * accumulated, seed=42))
    optimizer = torch.optim.AdamW(pruning.parameter_groups(RATES, 0.01))
    rates = [group["lr"] for group in optimizer.param_groups]
    pruning.train()
    pruning.update_masks_(0, steps)
    for step in range(steps):
        for _ in range(accumulated):
            batch = [rows[row] for row in next(batches)]
            inputs = collate(pruning, 0, batch[0][0], [feature for _, feature in batch])
            (pruning(**inputs).loss / accumulated).backward()
        share = step / 2 if step < 2 else (steps - step) / (steps - 2)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        nn.utils.clip_grad_norm_(pruning.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pruning.update_masks_(step + 1, steps)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_does_what_a_plain_loop_does(method: str, granularity: str, accumulated: int, tmp_path: Path) -> None:
    options = {"method": method, "granularity": granularity, "dropout": 0.0}
    ours, features = prepared(still_encoder(), **options)
    before = state(ours)
    given = arguments(tmp_path, gradient_accumulation_steps=accumulated, weight_decay=0.01, optim="adamw_torch")
    train(ours, features, given, tokenizer=pair_tokenizer(), learning_rates={"scores": 0.3, "sigma": 0.02})
    theirs, _ = prepared(still_encoder(), **options)
    by_hand(theirs, features, 8, 4, accumulated)
    first, second = state(ours), state(theirs)
    for name, tensor in first.items():
        if "(mask)" in name:
            assert torch.equal(tensor, second[name]), name
        else:
            assert torch.allclose(tensor, second[name], rtol=1e-5, atol=1e-7), name
    # All parameters have changed: weights, scores, singular values, and the heads of all tasks.
    learned = {name for name, tensor in first.items() if not torch.equal(tensor, before[name])}
    assert {name for name in first if "pooler" not in name and "key.bias" not in name and "position" not in name} <= learned


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_in_the_end_the_density_is_exact(setting: dict[str, Any], tmp_path: Path) -> None:
    pruning, features = prepared(still_encoder(), **setting)
    log = train(pruning, features, arguments(tmp_path, logging_steps=1), tokenizer=pair_tokenizer(), learning_rates=RATES)
    budget = round(0.3 * sum(mask.weights for mask in pruning.masks.values()))
    if setting["granularity"] == "element":
        assert pruning.stored == budget
    else:
        assert budget - sum(sum(mask.shape) for mask in pruning.masks.values()) < pruning.stored <= budget
    densities = [row["density"] for row in log if "loss" in row]
    assert densities[0] == densities[1] == 1  # A quarter of the steps is warm-up.
    assert densities[5] == densities[6] == densities[7] == pruning.reached  # And a quarter keeps the last density.
    assert densities == sorted(densities, reverse=True)
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 9))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_same_seed_gives_the_same_masks(granularity: str, tmp_path: Path) -> None:
    """Dropout is on, and also depends on the seed. Another seed gives other masks."""
    states = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)  # What came before does not matter.
        pruning, features = prepared(encoder("bert-sequence"), granularity=granularity)
        train(pruning, features, arguments(tmp_path, seed=seed), tokenizer=pair_tokenizer(), learning_rates=RATES)
        states.append(state(pruning))
    assert same(states[0], states[1])
    masks = [{name: tensor for name, tensor in final.items() if "(mask)" in name} for final in states]
    assert not same(masks[0], masks[2])


def test_progress_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruning, features = prepared(still_encoder())
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    train(pruning, features, arguments(tmp_path), tokenizer=pair_tokenizer(), progress=progress)
    assert told == [(step, 8) for step in range(9)]
    assert capsys.readouterr().out == ""  # Stdout is for results.


def test_each_task_is_evaluated_as_one_example_at_a_time_is() -> None:
    """Batches of several sizes give the same metrics. The model keeps its modes and its masks."""
    pruning, features = prepared(encoder("bert-sequence"))
    pruning.update_masks_(1, 1)
    pruning.encoder.train()
    pruning.heads["mood"].eval()
    modes = {name: module.training for name, module in pruning.named_modules()}
    before, rows = state(pruning), examples()
    evaluations = {
        size: [
            evaluate_task(pruning, name, rows[name], features[name], pair_tokenizer(), max_tokens=size).to_json()
            for name in TASKS
        ]
        for size in (1, 30, 8192)
    }
    assert {name: module.training for name, module in pruning.named_modules()} == modes
    assert same(state(pruning), before)
    pruning.eval()
    for place, (name, task) in enumerate(TASKS.items()):
        logits: list[Tensor] = []
        for feature in features[name]:
            type_ids = {"token_type_ids": torch.tensor([feature["token_type_ids"]])}
            ids = torch.tensor([feature["input_ids"]])
            with torch.no_grad():
                logits.append(pruning(name, ids, torch.ones_like(ids), **type_ids).logits[0])
        expected = task.score(rows[name], features[name], logits).to_json()
        for size in evaluations:
            assert evaluations[size][place] == pytest.approx(expected, abs=1e-5), (name, size)


def test_without_steps_there_is_no_training(tmp_path: Path) -> None:
    pruning, features = prepared(still_encoder())
    with pytest.raises(InputError, match=r"^max_steps: expected at least 1, got -1$"):
        train(pruning, features, arguments(tmp_path, max_steps=-1), tokenizer=pair_tokenizer())


def test_an_unknown_group_of_learning_rates(tmp_path: Path) -> None:
    pruning, features = prepared(still_encoder())
    with pytest.raises(InputError, match=r"^learning_rates: expected some of weights, scores, sigma, got heads$"):
        train(pruning, features, arguments(tmp_path), tokenizer=pair_tokenizer(), learning_rates={"heads": 1.0})
    assert list(LEARNING_RATES) == ["weights", "scores", "sigma"]
    assert list(tmp_path.iterdir()) == []


def test_examples_are_those_of_the_tasks() -> None:
    pruning, _ = prepared(still_encoder())
    rows = examples()
    del rows["size"]
    with pytest.raises(InputError, match=r"^examples: expected those of the tasks mood, size, where, got mood, where$"):
        features_of(pruning, pair_tokenizer(), rows, 24)
    rows = examples()
    rows["mood"][2]["target"] = "fine"
    with pytest.raises(InputError, match=r"^mood: examples, row 3: expected a target among the labels .*, got 'fine'$"):
        features_of(pruning, pair_tokenizer(), rows, 24)
