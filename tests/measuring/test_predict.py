"""predict: what a model says of each example, for every kind of task, and the files of `evaluate --predictions`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from cases import CASES
from command import Run, assert_refused
from transformers import BertForSequenceClassification

import secateur


@pytest.mark.parametrize("name", ["llama", "t5-gated", "bert-sequence"])
def test_predictions_agree_with_the_metric_and_the_probabilities(name: str) -> None:
    case = CASES[name]
    model, task = case.model(), case.task
    table = secateur.predict(model, task, case.examples)
    assert [row["input"] for row in table] == [example["input"] for example in case.examples]
    result = secateur.evaluate(model, task, case.examples)
    assert result.metric == "accuracy"
    assert sum(row["right"] for row in table) / len(table) == pytest.approx(result.value)
    with torch.inference_mode():
        of_labels = task.probabilities(model, case.examples, 8192)
    for row, probabilities in zip(table, of_labels, strict=True):
        assert {label: row[f"p_{label}"] for label in probabilities} == pytest.approx(probabilities, abs=1e-5)
        assert row["prediction"] == max(probabilities, key=lambda label: probabilities[label])
        assert row["right"] == (row["prediction"] == row["target"])


def test_the_tags_of_words() -> None:
    case = CASES["bert-token"]
    table = secateur.predict(case.model(), case.task, case.examples)
    assert all(len(row["prediction"]) == len(row["tokens"]) for row in table)
    assert all(row["tags"] == example["tags"] for row, example in zip(table, case.examples, strict=True))
    assert all(row["right"] == (row["prediction"] == row["tags"]) for row in table)


def test_open_targets_are_generated() -> None:
    model, tokenizer = secateur.builtin.load()
    rows = secateur.builtin.examples("question.test")[:12]
    table = secateur.predict(model, secateur.TextToText(tokenizer), rows)
    exact = secateur.evaluate(model, secateur.TextToText(tokenizer), rows)
    assert sum(row["right"] for row in table) == round(exact.value * len(rows))
    assert table[0]["prediction"].startswith(table[0]["target"][:3])


@pytest.mark.parametrize("kind", ["value", "labels"])
def test_values_and_several_labels(kind: str) -> None:
    case = CASES["bert-sequence"]
    config: Any = case.model().config
    config.num_labels = 1 if kind == "value" else 3
    config.problem_type = "regression" if kind == "value" else "multi_label_classification"
    torch.manual_seed(5)
    model = BertForSequenceClassification(config).eval()
    names = [model.config.id2label[k] for k in range(config.num_labels)]
    task = secateur.SequenceClassification(case.task.reader)
    targets: list[Any] = [0.5, "2"] if kind == "value" else [[names[0]], [names[2], names[1]]]
    rows = [{"input": example["input"], "target": target} for example, target in zip(case.examples, targets, strict=False)]
    one, two = secateur.predict(model, task, rows)
    with torch.inference_mode():
        scores = task.ranked(model, rows, 64)
    if kind == "value":
        assert (one["target"], two["target"]) == (0.5, 2.0)
        assert one["prediction"] == pytest.approx(float(scores[0, 0]))
        assert "right" not in one
    else:
        assert two["target"] == [names[1], names[2]]
        assert one["prediction"] == [name for name, score in zip(names, scores[0].tolist(), strict=True) if score > 0]
        assert one["right"] == (one["prediction"] == one["target"])


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_the_command_writes_a_table(run: Run, ending: str) -> None:
    file = Path(f"out.{ending}")
    result = run(
        f"evaluate builtin --data test.jsonl --examples 6 --labels bad,good --prompt movie:{{input}} --predictions {file}"
    )
    assert result.code == 0, result.errors
    assert f"predictions written to {file}" in result.out
    if ending == "parquet":
        rows = pyarrow.parquet.read_table(file).to_pylist()
    else:
        text = file.read_text()
        rows = list(csv.DictReader(text.splitlines())) if ending == "csv" else [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 6
    assert list(rows[0]) == ["input", "target", "prediction", "p_bad", "p_good", "right"]
    again = run(f"evaluate builtin --data test.jsonl --predictions {file}")
    assert again.errors[-1].startswith(f"secateur: predictions: expected a file that does not exist yet, got '{file}'")


def test_a_file_of_another_ending_is_refused_before_the_work(run: Run) -> None:
    assert_refused(
        run("evaluate builtin --data test.jsonl --predictions o.txt"), "predictions: expected a file ending", "o.txt"
    )
