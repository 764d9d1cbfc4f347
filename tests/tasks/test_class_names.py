"""Names and numbers of classes: what the model, the task and a data set call them, in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from cases import CASES, CLASSES, TAGS, piece_tokenizer, sentences, tagged
from transformers import BertConfig, BertForSequenceClassification

import secateur
from secateur.corpus import score
from secateur.data.examples import ClassName, read_examples
from secateur.tasks.classification import class_number
from secateur.tasks.token import TokenClassification

BERT = CASES["bert-sequence"]
TURNED = ["positive", "neutral", "negative"]


def rightly_labelled(model: Any, count: int = 24) -> list[dict[str, Any]]:
    """Return texts whose targets are the names that the model gives them. All classes occur."""
    inputs: list[dict[str, Any]] = [{"input": text} for text in sentences(count, seed=3)]
    with torch.inference_mode():
        best = BERT.task.ranked(model, inputs, 1000).argmax(1).tolist()
    rows = [{**row, "target": CLASSES[k]} for row, k in zip(inputs, best, strict=True)]
    assert len(set(best)) > 1
    return rows


def generic(count: int = 3) -> Any:
    """Return a model whose classes are LABEL_0, LABEL_1, ..."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(piece_tokenizer()), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            num_labels=count,
        )
    ).eval()  # fmt: skip


def class_labels(rows: list[dict[str, Any]], names: list[str]) -> datasets.Dataset:
    """Return rows as a data set whose targets are numbers of a ClassLabel with these names."""
    features = datasets.Features({"input": datasets.Value("string"), "target": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_list([{**row, "target": names.index(row["target"])} for row in rows], features=features)


@pytest.mark.parametrize("labels", [TURNED, [name.upper() for name in TURNED]], ids=["names", "upper case"])
def test_labels_in_another_order_are_matched_by_name(labels: list[str]) -> None:
    model = BERT.model()
    rows = rightly_labelled(model)
    spelling = {name.casefold(): name for name in labels}
    task = secateur.SequenceClassification(piece_tokenizer(), labels=labels)
    given = [{**row, "target": spelling[row["target"]]} for row in rows]
    assert secateur.evaluate(model, task, given).value == 1.0
    assert task.label_names(model) == [spelling[name] for name in CLASSES]
    expected = BERT.task.probabilities(model, rows, 1000)
    for ours, theirs in zip(task.probabilities(model, rows, 1000), expected, strict=True):
        assert {name.casefold(): value for name, value in ours.items()} == theirs


def test_tags_in_another_order_are_matched_by_name() -> None:
    case = CASES["bert-token"]
    task = TokenClassification(piece_tokenizer(), labels=TAGS[::-1])
    rows = tagged(12)
    assert secateur.evaluate(case.model(), task, rows) == secateur.evaluate(case.model(), case.task, rows)
    assert task.items(case.model(), rows) == case.task.items(case.model(), rows)


def test_labels_of_which_some_are_the_models_are_refused() -> None:
    task = secateur.SequenceClassification(piece_tokenizer(), labels=["negative", "mixed", "positive"])
    with pytest.raises(secateur.InputError, match=r"labels: expected the model's own names 'negative', 'neutral', 'positive'"):
        secateur.evaluate(BERT.model(), task, [{"input": "a cat", "target": "mixed"}])


def test_names_that_case_alone_tells_apart_are_compared_as_they_are() -> None:
    model = generic(2)
    model.config.id2label = {0: "us", 1: "US"}
    task = secateur.SequenceClassification(piece_tokenizer(), labels=["US", "us"])
    assert task.label_names(model) == ["us", "US"]


def test_a_label_that_is_given_twice_is_refused() -> None:
    with pytest.raises(secateur.InputError, match="labels: expected different labels, got one of them twice"):
        secateur.SequenceClassification(piece_tokenizer(), labels=["a", "b", "a"])


@pytest.mark.parametrize("names", [CLASSES, TURNED], ids=["the model's order", "another order"])
def test_numbers_of_a_class_label_stand_for_the_data_sets_names(names: list[str], tmp_path: Path) -> None:
    model = BERT.model()
    dataset = class_labels(rightly_labelled(model), names)
    dataset.to_parquet(tmp_path / "rows.parquet")
    streamed = dataset.to_iterable_dataset()
    for given in (dataset, dataset.with_format("numpy"), dataset.with_format("torch"), streamed, tmp_path / "rows.parquet"):
        assert secateur.evaluate(model, BERT.task, given).value == 1.0


def test_numbers_of_a_class_label_of_tags_stand_for_the_data_sets_names() -> None:
    case = CASES["bert-token"]
    rows, turned = tagged(6), TAGS[::-1]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=turned))}
    )
    numbered = [{**row, "tags": [turned.index(tag) for tag in row["tags"]]} for row in rows]
    dataset = datasets.Dataset.from_list(numbered, features=features)
    for given in (dataset, dataset.with_format("numpy")):
        assert secateur.evaluate(case.model(), case.task, given) == secateur.evaluate(case.model(), case.task, rows)


def test_a_class_label_with_names_that_are_not_the_models_is_refused() -> None:
    rows = [{"input": "a cat", "target": "bad"}, {"input": "a dog", "target": "fine"}]
    with pytest.raises(secateur.InputError, match=r"row 1: expected .* got 'bad', class 0 of the data set"):
        secateur.evaluate(BERT.model(), BERT.task, class_labels(rows, ["bad", "so-so", "fine"]))


def test_a_class_label_numbers_the_classes_of_a_model_without_names() -> None:
    rows = [{"input": "a cat", "target": "fine"}, {"input": "a dog", "target": "bad"}]
    task, names = secateur.SequenceClassification(piece_tokenizer()), ["bad", "so-so", "fine"]
    numbered = [{**row, "target": names.index(row["target"])} for row in rows]
    dataset = class_labels(rows, names)
    assert [item.target for item in task.items(generic(), read_examples(dataset, task.columns))] == [[2], [0]]
    assert secateur.evaluate(generic(), task, dataset).examples == secateur.evaluate(generic(), task, numbered).examples
    with pytest.raises(secateur.InputError, match="class 2 of the data set"):
        secateur.evaluate(generic(4), task, dataset)


def test_a_closed_text_task_takes_the_names_of_a_class_label() -> None:
    case = CASES["t5-relu"]
    rows = [{"input": "a cat", "target": "no way"}, {"input": "a dog", "target": "yes"}]
    dataset = class_labels(rows, ["yes", "no way"])
    assert secateur.evaluate(case.model(), case.task, dataset) == secateur.evaluate(case.model(), case.task, rows)


@pytest.mark.parametrize(
    ("value", "number"),
    [("b", 1), (1, 1), ("1", 1), (np.int64(1), 1), (np.uint8(1), 1), (torch.tensor(1), 1), (np.str_("b"), 1)],
)
def test_a_class_has_a_name_and_a_number(value: Any, number: int) -> None:
    assert class_number(["a", "b"], value, "row 1") == number


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), 1.0, "1.0", " 1", "²", 2, "2", -1, "-1", None, "c"]
)
def test_what_is_no_name_and_no_number_of_a_class_is_refused(value: Any) -> None:
    with pytest.raises(secateur.InputError, match="row 1: expected a target among the labels 'a', 'b' or its number"):
        class_number(["a", "b"], value, "row 1")


def test_numbers_that_are_names_are_names() -> None:
    stars = ["1", "2", "3"]
    assert [class_number(stars, text, "row 1") for text in stars] == [0, 1, 2]
    with pytest.raises(secateur.InputError, match="the number 1, the name of one class and the place of another"):
        class_number(stars, 1, "row 1")
    unnamed = ClassName.of(1, datasets.ClassLabel(num_classes=3).names)
    assert class_number(CLASSES, unnamed, "row 1") == 1


def test_class_numbers_of_a_csv_file_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("input,target\na cat,2\na dog,0\n")
    rows = [{"input": "a cat", "target": 2}, {"input": "a dog", "target": 0}]
    model = BERT.model()
    assert secateur.attribute(model, BERT.task, tmp_path / "rows.csv").equal(secateur.attribute(model, BERT.task, rows))


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({1: "neg", 2: "neu", 3: "pos"}, "to number its 3 outputs from 0 to 2, got '1', '2', '3'"),
        ({0: "neg", 1: "pos"}, "to number its 3 outputs from 0 to 2, got '0', '1'"),
        ({0: "x", 1: "y", 2: "x"}, "expected different names in its config's id2label, got 'x' twice"),
    ],
)
def test_names_of_the_config_that_do_not_fit_the_outputs_are_refused(id2label: dict[int, str], message: str) -> None:
    model, task = generic(), secateur.SequenceClassification(piece_tokenizer())
    model.config.id2label = id2label
    with pytest.raises(secateur.InputError, match=message):
        list(score(model, task, ["a cat"], threads=1))
    with pytest.raises(secateur.InputError, match=message):
        secateur.attribute(model, task, [{"input": "a cat", "target": 0}, {"input": "a dog", "target": 1}])


def test_labels_replace_a_name_that_the_config_gives_twice() -> None:
    model = generic()
    model.config.id2label = {0: "x", 1: "y", 2: "x"}
    assert secateur.SequenceClassification(piece_tokenizer(), labels=["a", "b", "c"]).label_names(model) == ["a", "b", "c"]


def test_a_parquet_file_with_damaged_features_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"input": ["a cat"], "target": [0]}).replace_schema_metadata({"huggingface": "{"})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(secateur.InputError, match="cannot be read to its end"):
        read_examples(tmp_path / "rows.parquet", ("input", "target"))
