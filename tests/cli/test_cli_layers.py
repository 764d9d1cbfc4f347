"""`secateur layers` on the built-in model: its files, its JSON, and exit code 2 with one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import Run, assert_refused

import secateur
from secateur.attribution.layer_scores import choose_layers, layer_scores
from secateur.data import builtin

SHAPE = "--batch-sizes 1 --lengths 8"


def test_the_command_equals_the_library_step_by_step(run: Run) -> None:
    result = run(f"layers builtin --data train.jsonl --eval test.jsonl --keep-layers 5 --criterion ig --out d {SHAPE} --json")
    assert result.code == 0
    document = result.document  # stdout holds exactly one JSON document, or parsing fails.
    model, tokenizer = builtin.load()
    task = secateur.TextToText(tokenizer, labels=["bad", "good"])
    scores = layer_scores(model, task, "train.jsonl", "ig")
    assert document["scores"] == pytest.approx(scores, rel=1e-3)
    assert document["deleted"] == choose_layers(scores, 5)
    assert document["verification"]["holds"] is True
    assert document["parameters"]["pruned"] < document["parameters"]["dense"]
    assert json.loads(Path("d/report.json").read_text()) == document
    assert Path("d/benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert secateur.load("d").dtype == torch.float16  # The dense model's stored dtype.
    evaluated = run("evaluate d --data test.jsonl --json").document
    assert evaluated["value"] == document["evaluation"]["pruned"]["value"]


def test_the_command_shows_which_layers_are_removed(run: Run) -> None:
    result = run(f"layers builtin --data train.jsonl --examples 16 --keep-layers 6 --out d {SHAPE}")
    assert result.code == 0
    assert result.out.count(" deleted\n") == 1
    assert "pruned equals masked" in result.out
    assert "\nwritten to d\n" in result.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--keep-layers 0", "keep_layers: expected a number from 2, one for each stack, to the model's 7, got 0"),
        ("--keep-layers 8", "keep_layers: expected a number from 2, one for each stack, to the model's 7, got 8"),
        ("--keep-layers 3 --criterion wanda", "criterion: expected some of influence, gradient, ig, ig-joint, got 'wanda'"),
        ("--keep-layers 3 --unit head", "unit: expected some of block, branch, got 'head'"),
        ("--keep-layers 9 --unit branch", "unit: expected 'block' with criterion 'influence', got 'branch'"),
        ("--keep-layers 3 --data none.jsonl", "data: no such file: 'none.jsonl'"),
    ],
)
def test_bad_input_is_one_line(run: Run, options: str, message: str) -> None:
    result = run(f"layers builtin --data train.jsonl --out d {options}")
    assert_refused(result, message, "d")
