"""The YAML file of `secateur multitask`: its fields, and the Trainer's arguments that are built from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from secateur import InputError
from secateur.learned.multitask.config import Config, PruningConfig, TaskConfig, load_task, read_config, training_arguments
from secateur.learned.multitask.encoder_tasks import Classification, Regression, Span
from secateur.learned.multitask.schedule import CubicSchedule

LEAST = "model: builtin\ntasks: {movie: 'builtin:movie'}\n"


def read(tmp_path: Path, text: str) -> Config:
    (tmp_path / "c.yaml").write_text(text)
    return read_config(tmp_path / "c.yaml")[0]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def test_the_least_config_has_the_papers_settings(tmp_path: Path) -> None:
    assert read(tmp_path, LEAST) == Config("builtin", {"movie": TaskConfig("builtin:movie")})
    assert Config("m", {}).pruning == PruningConfig("movement", "element", "global", 0.1, None)
    assert Config("m", {}).schedule == CubicSchedule(0.25, 0.25)
    assert TaskConfig("d") == TaskConfig("d", None, "classification", None, "accuracy", False, None)


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """
model: ./bert
tasks:
  one: {data: one.jsonl, eval: test.jsonl, labels: [no, yes, 3], metric: matthews, pair: true, examples: 100}
  two: {data: two.jsonl, kind: regression}
pruning: {method: magnitude, granularity: rank, scope: local, density: 3e-1, initial_scores: ./trained}
schedule: {warmup: 0, cooldown: 5e-1}
learning_rates: {weights: 3e-5, scores: 1E-2, sigma: .5e-2}
training: {max_steps: 7, learning_rate: 2e-05, bf16: false}
pooling: first
max_length: 64
""",
    )
    one = TaskConfig("one.jsonl", "test.jsonl", "classification", ("no", "yes", "3"), "matthews", True, 100)
    assert config.tasks == {"one": one, "two": TaskConfig("two.jsonl", kind="regression")}
    assert config.pruning == PruningConfig("magnitude", "rank", "local", 0.3, "./trained")
    assert config.schedule == CubicSchedule(0, 0.5)
    assert config.learning_rates == {"weights": 3e-5, "scores": 0.01, "sigma": 0.005}
    assert config.training == {"max_steps": 7, "learning_rate": 2e-5, "bf16": False}
    assert (config.model, config.pooling, config.max_length) == ("./bert", "first", 64)


@pytest.mark.parametrize(
    ("text", "value"), [("3e-5", 3e-5), ("1E3", 1000.0), ("-2.5e-1", -0.25), (".5e1", 5.0), ("1.e2", 100.0)]
)
def test_a_number_with_an_exponent_is_one(text: str, value: float, tmp_path: Path) -> None:
    number = read(tmp_path, f"{LEAST}training: {{adam_epsilon: {text}}}\n").training["adam_epsilon"]
    assert (type(number), number) == (float, value)


@pytest.mark.parametrize("rate", [".nan", ".inf", "-1", "-1e-3", "1e400", "9" * 30, "'1e-3'", "true"])
@pytest.mark.parametrize("group", ["weights", "scores", "sigma"])
def test_learning_rates_that_are_none(group: str, rate: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^learning_rates: expected (numbers for|a number from 0 to) .*"):
        read(tmp_path, f"{LEAST}learning_rates: {{{group}: {rate}}}\n")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("learning_rate", ".nan"), ("learning_rate", "-1"), ("learning_rate", ".inf"), ("max_steps", "100000000000000"),
        ("num_train_epochs", "1e14"), ("num_train_epochs", ".nan"), ("max_grad_norm", ".nan"), ("weight_decay", "-1"),
        ("seed", "9" * 30), ("seed", "-1"), ("adam_beta1", "2"), ("per_device_train_batch_size", "100000000000000"),
        ("warmup_steps", "x"), ("save_total_limit", "0"), ("logging_steps", "-1"),
    ],
)  # fmt: skip
def test_numbers_for_the_trainer_out_of_range(name: str, text: str, tmp_path: Path) -> None:
    config = read(tmp_path, f"{LEAST}training: {{max_steps: 5, {name}: {text}}}\n".replace("max_steps: 5, max", "max"))
    with pytest.raises(InputError, match=rf"^training.{name}: expected [^\n]*$"):
        training_arguments(config, {"a": 100}, tmp_path / "c", "cpu")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [BOMB + LEAST, BOMB + "model: m\ntasks: {one: {data: d, labels: *i}}\n", "a: &a [*a]\n"])
def test_a_bomb_of_aliases_is_refused(text: str, tmp_path: Path) -> None:
    """Nine lines stand for 9^9 values."""
    with pytest.raises(InputError, match=r"^config: [^\n]{1,300}$"):
        read(tmp_path, text)


def test_aliases_that_repeat_a_little_are_read(tmp_path: Path) -> None:
    config = read(tmp_path, "model: m\ntasks: {one: &t {data: d.jsonl}, two: *t}\n")
    assert config.tasks["one"] == config.tasks["two"] == TaskConfig("d.jsonl")


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "2024-01-01", "e5", "3e", "v1e5"])
def test_words_that_older_yaml_takes_for_something_else_are_words(text: str, tmp_path: Path) -> None:
    """Labels are often yes and no, and a run's name may be a date."""
    config = read(tmp_path, f"{LEAST}training: {{run_name: {text}}}\n")
    assert config.training == {"run_name": text}
    assert read(tmp_path, f"model: m\ntasks: {{a: {{data: d, labels: [{text}, x]}}}}\n").tasks["a"].labels == (text, "x")


def test_the_file_as_it_was_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"{LEAST}schedule: {{warmup: 0.1}}\n")
    content = read_config(tmp_path / "c.yaml")[1]
    assert content == {"model": "builtin", "tasks": {"movie": "builtin:movie"}, "schedule": {"warmup": 0.1}}
    json.dumps(content)


def test_tasks_of_each_kind(tmp_path: Path) -> None:
    text = {"input": "a text", "pair": "another", "more": 1}
    classes = write(tmp_path, "classes.jsonl", [{**text, "target": label} for label in ("so", "no", "so", "maybe")])
    numbers = write(tmp_path, "numbers.jsonl", [{**text, "target": 1.5}, {**text, "target": 2}])
    answers = {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}, "id": 5}
    spans = write(tmp_path, "spans.jsonl", [answers] * 3)
    task, train, test = load_task("a", TaskConfig(classes, eval=classes, examples=3))
    assert task == Classification(("no", "so"))  # Only the labels of the examples that are taken.
    assert train == [{"input": "a text", "target": label} for label in ("so", "no", "so")]
    assert len(test) == 4
    task, train, test = load_task("a", TaskConfig(classes, labels=("so", "no", "maybe"), pair=True))
    assert task == Classification(("so", "no", "maybe"))
    assert set(train[0]) == {"input", "pair", "target"}
    assert test == []
    assert load_task("a", TaskConfig(classes, metric="matthews", labels=("so", "no")))[0] == Classification(
        ("so", "no"), "matthews"
    )
    assert load_task("b", TaskConfig(numbers, kind="regression"))[:2] == (
        Regression(), [{"input": "a text", "target": 1.5}, {"input": "a text", "target": 2}],
    )  # fmt: skip
    task, train, _ = load_task("c", TaskConfig(spans, kind="span", pair=True))
    assert task == Span()
    assert set(train[0]) == {"question", "context", "answers"}


def test_class_numbers_are_names_where_no_others_are_given(tmp_path: Path) -> None:
    numbers = write(tmp_path, "numbers.jsonl", [{"input": "x", "target": target} for target in (1, 0, 2)])
    task, train, _ = load_task("a", TaskConfig(numbers))
    assert task == Classification(("0", "1", "2"))
    assert [row["target"] for row in train] == ["1", "0", "2"]
    task, train, _ = load_task("a", TaskConfig(numbers, labels=("x", "y", "z")))
    assert [row["target"] for row in train] == [1, 0, 2]


def test_numbers_of_a_class_label_have_names(tmp_path: Path) -> None:
    features = datasets.Features({"input": datasets.Value("string"), "target": datasets.ClassLabel(names=["no", "so"])})
    rows = datasets.Dataset.from_list([{"input": "x", "target": target} for target in (1, 0)], features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    for labels, targets in ((None, ["so", "no"]), (("so", "no"), ["so", "no"]), (("x", "y"), [1, 0])):
        task, train, _ = load_task("a", TaskConfig(str(tmp_path / "rows.parquet"), labels=labels))
        assert task == Classification(labels or ("no", "so"))
        assert [row["target"] for row in train] == targets


def arguments_with(tmp_path: Path, **training: Any) -> Any:
    return training_arguments(Config("m", {}, training=training), {"a": 100, "b": 30}, tmp_path / "c", "cpu")


def test_arguments_of_the_trainer(tmp_path: Path) -> None:
    arguments = arguments_with(tmp_path, max_steps=400, learning_rate=1e-4, weight_decay=0.1)
    assert (arguments.max_steps, arguments.learning_rate, arguments.weight_decay) == (400, 1e-4, 0.1)
    # The defaults: a tenth of the steps is warm-up, four checkpoints, fifty log entries, nothing on stdout.
    assert (arguments.warmup_steps, arguments.save_steps, arguments.logging_steps, arguments.save_total_limit) == (
        40,
        100,
        8,
        1,
    )
    assert (
        arguments.per_device_train_batch_size,
        arguments.lr_scheduler_type,
        arguments.report_to,
        arguments.disable_tqdm,
    ) == (
        32,
        "linear",
        [],
        True,
    )
    assert arguments.use_cpu
    given = arguments_with(tmp_path, max_steps=400, warmup_steps=3, save_steps=7, logging_steps=9, save_total_limit=5)
    assert (given.warmup_steps, given.save_steps, given.logging_steps, given.save_total_limit) == (3, 7, 9, 5)
    few = arguments_with(tmp_path, max_steps=1)
    assert (few.warmup_steps, few.save_steps, few.logging_steps) == (0, 1, 1)
    assert list(tmp_path.iterdir()) == []


def test_epochs_are_of_all_tasks_examples(tmp_path: Path) -> None:
    assert arguments_with(tmp_path, num_train_epochs=3, per_device_train_batch_size=8).max_steps == 49  # 390 examples.
    arguments = arguments_with(tmp_path, num_train_epochs=2.5, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert (arguments.max_steps, arguments.warmup_steps, arguments.save_steps) == (41, 4, 10)
    assert arguments_with(tmp_path, num_train_epochs=3, max_steps=5).max_steps == 5


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({}, r"^training: expected max_steps or num_train_epochs, got neither$"),
        ({"max_steps": 0}, r"^training: expected max_steps or num_train_epochs, got neither$"),
        ({"num_train_epochs": 0}, r"^training.num_train_epochs: expected more than 0, got 0$"),
        ({"num_train_epochs": -1.5}, r"^training.num_train_epochs: expected more than 0, got -1.5$"),
        ({"num_train_epochs": "three"}, r"^training.num_train_epochs: expected float, got 'three'$"),
        ({"max_steps": 5.5}, r"^training.max_steps: expected int, got 5.5$"),
        ({"max_steps": True}, r"^training.max_steps: expected int, got True$"),
        ({"max_steps": 5, "learning_rate": "x"}, r"^training.learning_rate: expected float, got 'x'$"),
        ({"max_steps": 5, "max_grad_norm": None}, r"^training.max_grad_norm: expected float, got None$"),
        ({"max_steps": 5, "seed": "x"}, r"^training.seed: expected int, got 'x'$"),
        ({"max_steps": 5, "bf16": "no"}, r"^training.bf16: expected bool, got 'no'$"),
        ({"max_steps": 5, "save_total_limit": 1.5}, r"^training.save_total_limit: expected int \| None, got 1.5$"),
        (
            {"max_steps": 5, "per_device_train_batch_size": 0},
            r"^training.per_device_train_batch_size: expected at least 1, got 0$",
        ),
        (
            {"max_steps": 5, "gradient_accumulation_steps": -2},
            r"^training.gradient_accumulation_steps: expected at least 1, got -2$",
        ),
        ({"max_steps": 5, "eval_strategy": "epoch"}, r"^training.eval_strategy: expected 'no' \(tasks are .*\), got 'epoch'$"),
        ({"max_steps": 5, "report_to": "frob"}, r"^training.report_to: expected installed integrations, got frob$"),
        ({"max_steps": 5, "frob": 1}, r"^training: .* got an unexpected keyword argument 'frob'$"),
        ({"max_steps": 5, "output_dir": "x"}, r"^training: .* got multiple values for argument 'output_dir'$"),
        ({"max_steps": 5, "optim": "frob"}, r"^training: frob is not a valid OptimizerNames"),
        ({"max_steps": 5, "lr_scheduler_type": "frob"}, r"^training: frob is not a valid SchedulerType"),
        ({"max_steps": 5, "load_best_model_at_end": True}, r"^training: --load_best_model_at_end requires"),
        ({3: 5}, r"^training: "),
    ],
    ids=str,
)
def test_arguments_that_make_no_training(training: dict[Any, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        training_arguments(Config("m", {}, training=training), {"a": 100, "b": 30}, tmp_path / "c", "cpu")
    assert list(tmp_path.iterdir()) == []
