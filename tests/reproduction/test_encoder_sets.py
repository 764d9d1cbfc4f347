"""The nine data sets of multitask pruning: local copies with the Hub's columns, rows that do not fit, and training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import CASES
from encoder_rows import pair_tokenizer, rows_of, write
from transformers import TrainingArguments

from secateur import InputError
from secateur.learned.multitask.encoder_tasks import Classification, Regression, Span
from secateur.learned.multitask.model import encoder_of
from secateur.learned.multitask.run import TaskData, prepare, run
from secateur.reproduction.ap import glue
from secateur.reproduction.multitask.encoder_sets import NINE, SETS, THREE, examples, task


def test_the_two_settings() -> None:
    assert THREE == ("mnli", "qqp", "squad")
    assert set(NINE) == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "squad"}
    assert len(NINE) == 9
    assert task("cola") == Classification(("unacceptable", "acceptable"), "matthews")
    assert isinstance(task("stsb"), Regression)
    assert isinstance(task("squad"), Span)
    assert SETS["mnli"].evaluation == "validation_matched"
    assert {known.evaluation for name, known in SETS.items() if name != "mnli"} == {"validation"}
    # Data sets that both reproductions read have the same columns and labels in both.
    for name in set(SETS) & set(glue.SETS):
        known, other = SETS[name], glue.SETS[name]
        assert (known.repository, known.subset, known.columns) == (other.repository, other.subset, other.fields)
        assert known.task == Classification(other.labels)


@pytest.mark.parametrize("parquet", [False, True], ids=["jsonl", "parquet"])
@pytest.mark.parametrize("name", NINE)
def test_rows_in_the_hubs_columns(tmp_path: Path, name: str, parquet: bool) -> None:
    rows, known = rows_of(name, 12), SETS[name]
    write(tmp_path, name, known.evaluation, rows, parquet=parquet)
    read = examples(name, known.evaluation, tmp_path)
    assert len(read) == 12
    for row, example in zip(rows, read, strict=True):
        if name == "squad":
            assert example == {column: row[column] for column in ("question", "context", "answers")}
            continue
        expected = {"input": row[known.columns[0]]} | ({"pair": row[known.columns[1]]} if len(known.columns) == 2 else {})
        label = known.task.names[row["label"]] if isinstance(known.task, Classification) else row["label"]
        assert example == expected | {"target": label}
    assert examples(name, known.evaluation, tmp_path, limit=5) == read[:5]


@pytest.mark.parametrize(("name", "label"), [("mnli", -1), ("stsb", -1.0)])
def test_rows_without_a_label_are_left_out(tmp_path: Path, name: str, label: float) -> None:
    rows = rows_of(name, 6)
    write(tmp_path, name, "train", [rows[0] | {"label": label}, *rows[1:4], rows[4] | {"label": label}, rows[5]])
    write(tmp_path, name, "test", [row | {"label": label} for row in rows])
    whole = examples(name, "train", tmp_path)
    assert [example["input"] for example in whole] == [rows[n][SETS[name].columns[0]] for n in (1, 2, 3, 5)]
    # A limit counts only the rows with a label.
    assert examples(name, "train", tmp_path, limit=4) == whole
    assert examples(name, "test", tmp_path) == []


CONTEXT = {"question": "where", "context": "on the mat"}
PAIR = {"sentence1": "a", "sentence2": "b"}
BAD = [
    ("mnli", {"premise": "a", "label": 0}, "premise, hypothesis and a label below 3, got {'premise': 'a', 'label': 0}"),
    ("mnli", {"premise": "a", "hypothesis": None, "label": 0}, "premise, hypothesis and a label below 3, got "),
    ("rte", PAIR, "sentence1, sentence2 and a label below 2, got "),
    ("rte", PAIR | {"label": 2}, "sentence1, sentence2 and a label below 2, got .*'label': 2"),
    ("rte", PAIR | {"label": "entailment"}, "sentence1, sentence2 and a label below 2, got .*'label': 'entailment'"),
    ("rte", PAIR | {"label": 0.5}, "sentence1, sentence2 and a label below 2, got .*'label': 0.5"),
    ("cola", {"sentence": 3, "label": 1}, "sentence and a label below 2, got "),
    ("stsb", PAIR | {"label": "2.5"}, "sentence1, sentence2 and a number as label, got "),
    ("stsb", PAIR | {"label": True}, "sentence1, sentence2 and a number as label, got "),
    ("squad", CONTEXT, "question, context and answers with texts and where they start, got "),
    ("squad", CONTEXT | {"answers": "mat"}, "question, context and answers with texts and where they start, got "),
    ("squad", CONTEXT | {"answers": {"text": ["mat"]}}, "question, context and answers with texts"),
    ("squad", CONTEXT | {"answers": {"text": [], "answer_start": []}}, "question, context and answers with texts"),
    ("squad", CONTEXT | {"answers": {"text": ["mat", "on"], "answer_start": [7]}}, "question, context and answers with"),
    ("squad", CONTEXT | {"answers": {"text": ["mat"], "answer_start": [-7]}}, "question, context and answers with texts"),
    ("squad", CONTEXT | {"answers": {"text": ["mat"], "answer_start": ["7"]}}, "question, context and answers with texts"),
    ("squad", CONTEXT | {"answers": {"text": [7], "answer_start": [7]}}, "question, context and answers with texts"),
    ("squad", CONTEXT | {"answers": [{"text": "mat", "answer_start": 7}]}, "question, context and answers with texts"),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(BAD)])
def test_rows_that_do_not_fit(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    write(tmp_path, name, "train", [row])
    with pytest.raises(InputError, match=f"^{name}, train, row 1: expected {message}"):
        examples(name, "train", tmp_path)


def test_the_row_that_does_not_fit_is_counted_and_cut_short(tmp_path: Path) -> None:
    rows = rows_of("squad", 3)
    rows[2]["context"], rows[2]["answers"]["answer_start"] = "the mat " * 1000, [-1, 0]
    write(tmp_path, "squad", "train", rows)
    with pytest.raises(InputError, match=r"^squad, train, row 3: expected question, context and answers") as caught:
        examples("squad", "train", tmp_path)
    assert len(str(caught.value)) < 500
    # Rows after the limit are not read.
    assert len(examples("squad", "train", tmp_path, limit=2)) == 2


def test_sets_and_files_that_are_not_there(tmp_path: Path) -> None:
    known = "mnli, qqp, squad, cola, sst2, mrpc, stsb, qnli, rte"
    for call in (lambda: task("boolq"), lambda: examples("boolq", "train", tmp_path)):
        with pytest.raises(InputError, match=f"^tasks: expected some of {known}, got 'boolq'"):
            call()
    with pytest.raises(InputError, match=r"^data-root: no such file: '.*qqp/train' with \.parquet or \.jsonl"):
        examples("qqp", "train", tmp_path)
    (tmp_path / "qqp").mkdir()
    for suffix in ("jsonl", "parquet"):
        (tmp_path / "qqp" / f"train.{suffix}").write_text("{no rows")
        with pytest.raises(InputError, match=rf"^data-root: cannot read '.*qqp/train\.{suffix}'"):
            examples("qqp", "train", tmp_path)


@pytest.mark.parametrize("max_length", [20, 32, 80])
def test_questions_of_any_length(max_length: int) -> None:
    for words in (0, 5, 15, 19, 64, 300):
        context = "the cat sat on the mat " * 20
        row = {"question": "play " * words, "context": context, "answers": {"text": ["mat"], "answer_start": [19]}}
        windows = task("squad").features(pair_tokenizer(), [row], max_length)
        assert max(len(feature["input_ids"]) for feature in windows) <= max_length
        # Every piece of the context is in a window, and there are no more windows than the overlap requires.
        seen = {place for feature in windows for place in feature["places"] if place is not None}
        assert len(seen) == 120
        assert len(windows) <= 120 / (max_length // 4 - 3) + 1
        starts = {feature["places"][feature["label"][0]] for feature in windows if feature["label"] != (0, 0)}
        assert starts == {(19, 22)}
    with pytest.raises(InputError, match=r"^max_length: expected at least 20 for a question and its context, got 19"):
        task("squad").features(pair_tokenizer(), [row], 19)


def test_a_tiny_bert_is_pruned_on_local_copies(tmp_path: Path) -> None:
    names = ("mnli", "squad", "stsb")
    for number, name in enumerate(names):
        for split, count in (("train", 8), (SETS[name].evaluation, 6)):
            write(tmp_path / "sets", name, split, rows_of(name, count), parquet=bool(number % 2))
    data = {
        name: TaskData(task(name), *(examples(name, split, tmp_path / "sets") for split in ("train", SETS[name].evaluation)))
        for name in names
    }
    arguments = TrainingArguments(
        str(tmp_path / "checkpoints"), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    encoder = encoder_of(CASES["bert-sequence"].model())
    result = run(prepare(encoder, pair_tokenizer(), data, max_length=32, density=0.25), arguments)
    assert result.pruning.reached == pytest.approx(0.25, abs=1e-3)
    assert {name: evaluation.metric for name, evaluation in result.evaluations.items()} == {
        "mnli": "accuracy", "squad": "f1", "stsb": "pearson"
    }  # fmt: skip
    assert all(evaluation.examples == 6 for evaluation in result.evaluations.values())
