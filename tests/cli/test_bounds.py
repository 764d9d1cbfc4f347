"""Typing errors of many digits end at once in one line, and arguments of wrong types are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import CASES
from command import Run, assert_refused

import secateur
from secateur import InputError
from secateur.attribution.layer_scores import choose_layers
from secateur.measuring.synthetic import synthetic_batches
from secateur.pruning.delete_layers import delete_layers
from secateur.pruning.factorise import factorise
from secateur.support.trainer import trainer_arguments

HUGE = 10**12
LINES = [
    (f"ldnet train-lm text --out d --steps {HUGE}", "Invalid value for '--steps'"),
    (f"ldnet train-lm text --out d --layers {HUGE}", "Invalid value for '--layers'"),
    (f"layer-gates m --data test.jsonl --keep-layers 1 --out d --steps {HUGE}", "Invalid value for '--steps'"),
    (f"reproduce multitask --out d --steps {HUGE}", "Invalid value for '--steps'"),
    (f"reproduce ldnet --data x --out d --steps {HUGE}", "Invalid value for '--steps'"),
    (f"reproduce ldnet --data x --out d --layers {HUGE}", "Invalid value for '--layers'"),
    (f"benchmark m m --out d --pairs {HUGE}", "Invalid value for '--pairs'"),
    (f"benchmark m m --out d --target-length {HUGE}", "Invalid value for '--target-length'"),
    (f"benchmark m m --out d --batch-sizes 1,{HUGE}", f"batch-sizes: expected a whole number from 1 to 65536, got {HUGE}"),
    (f"benchmark m m --out d --lengths {HUGE}", f"lengths: expected a whole number from 1 to 1048576, got {HUGE}"),
    (f"prune m --data test.jsonl --keep 0.5 --out d --batch-sizes {HUGE}", "batch-sizes: expected a whole number from 1 to "),
    (f"layers m --data test.jsonl --keep-layers 1 --out d --batch-sizes {HUGE}", "batch-sizes: expected a whole number from "),
    (f"layer-gates m --data test.jsonl --keep-layers 1 --out d --batch-sizes {HUGE}", "batch-sizes: expected a whole number "),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[line for line, _ in LINES])
def test_options_of_many_digits(run: Run, line: str, message: str, tmp_path: Path) -> None:
    """The model "m" does not exist: the option is refused before any work."""
    assert_refused(run(line), message, tmp_path / "d")


BERT = CASES["bert-sequence"]
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "pairs": (lambda: secateur.benchmark(BERT.model(), BERT.model(), [], pairs=HUGE), "pairs: expected a whole number from 1 "),
    "batch sizes": (lambda: synthetic_batches(BERT.model(), [HUGE], [4]), "batch_sizes: expected a whole number from 1 to 65"),
    "steps": (lambda: trainer_arguments(Path("x"), "cpu", {"max_steps": HUGE}), "max_steps: expected a whole number from -1 "),
}
WRONG: list[Any] = [None, "x", [0.5], {}, object(), True, 0, 3, float("nan")]
for k, value in enumerate(WRONG):
    CALLS[f"factorise, keep {k}"] = (lambda value=value: factorise(BERT.model(), value), "keep: ")  # type: ignore[misc]
    if value not in (None, "x"):
        CALLS[f"factorise, select {k}"] = (lambda value=value: factorise(BERT.model(), 0.5, value), "select: ")  # type: ignore[misc]
    CALLS[f"factorise, model {k}"] = (lambda value=value: factorise(value, 0.5), "model: ")  # type: ignore[misc]
    CALLS[f"delete_layers, model {k}"] = (lambda value=value: delete_layers(value, []), "model: ")  # type: ignore[misc]
    CALLS[f"choose_layers, scores {k}"] = (lambda value=value: choose_layers(value, 1), "")  # type: ignore[misc]
    if value not in ([], {}):
        CALLS[f"delete_layers, gone {k}"] = (lambda value=value: delete_layers(BERT.model(), value), "layers: ")  # type: ignore[misc]
        CALLS[f"delete_layers, name {k}"] = (lambda value=value: delete_layers(BERT.model(), [value]), "layers: ")  # type: ignore[misc]
        CALLS[f"delete_layers, scales {k}"] = (
            lambda value=value: delete_layers(BERT.model(), [], scales=value), "scales: "  # type: ignore[misc]
        )  # fmt: skip
    if value is not True:
        CALLS[f"delete_layers, scale {k}"] = (
            lambda value=value: delete_layers(BERT.model(), [], scales={"encoder.0": value}), "scales: "  # type: ignore[misc]
        )  # fmt: skip
    if value not in (True, 0, 3):
        CALLS[f"choose_layers, score {k}"] = (
            lambda value=value: choose_layers({"encoder.0": value, "encoder.1": 1.0}, 1), ""  # type: ignore[misc]
        )  # fmt: skip
    if value != 1:
        CALLS[f"choose_layers, keep {k}"] = (
            lambda value=value: choose_layers({"encoder.0": 0.5, "encoder.1": 1.0}, value), "keep_layers: "  # type: ignore[misc]
        )  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_are_refused(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    expected = {"scores": ("scores: ", "keep_layers: "), "score": ("scores: ", "model: the score of")}
    if name.startswith("choose_layers, score"):
        assert str(caught.value).startswith(expected[name.split()[1]])
