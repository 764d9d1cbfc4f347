"""The nine data sets of the paper (from GLUE and SQuAD, on the Hub) as examples of an encoder's tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.data.examples import Example
from secateur.learned.multitask.encoder_tasks import Classification, EncoderTask, Regression, Span
from secateur.reproduction.shared import hub
from secateur.support.errors import InputError


@dataclass(frozen=True)
class EncoderSet:
    """A data set on the Hub.

    Args:
        repository: The repository's name.
        subset: The subset's name.
        columns: The text columns. For classification and regression they become "input" and "pair".
        task: The task to learn from the data set.
        evaluation: The split to evaluate on.
    """

    repository: str
    subset: str
    columns: tuple[str, ...]
    task: EncoderTask
    evaluation: str = "validation"


GLUE = "nyu-mll/glue"
ENTAILMENT = ("entailment", "not_entailment")
# The position of a label's name is its number on the Hub.
SETS = {
    "mnli": EncoderSet(
        GLUE,
        "mnli",
        ("premise", "hypothesis"),
        Classification(("entailment", "neutral", "contradiction")),
        evaluation="validation_matched",
    ),
    "qqp": EncoderSet(GLUE, "qqp", ("question1", "question2"), Classification(("not_duplicate", "duplicate"))),
    "squad": EncoderSet("rajpurkar/squad", "plain_text", ("question", "context"), Span()),
    "cola": EncoderSet(GLUE, "cola", ("sentence",), Classification(("unacceptable", "acceptable"), "matthews")),
    "sst2": EncoderSet(GLUE, "sst2", ("sentence",), Classification(("negative", "positive"))),
    "mrpc": EncoderSet(GLUE, "mrpc", ("sentence1", "sentence2"), Classification(("not_equivalent", "equivalent"))),
    "stsb": EncoderSet(GLUE, "stsb", ("sentence1", "sentence2"), Regression()),
    "qnli": EncoderSet(GLUE, "qnli", ("question", "sentence"), Classification(ENTAILMENT)),
    "rte": EncoderSet(GLUE, "rte", ("sentence1", "sentence2"), Classification(ENTAILMENT)),
}
# The two selections of tasks in Xia and Shin 2021 (arXiv 2112.05705).
THREE = ("mnli", "qqp", "squad")
NINE = tuple(SETS)


def task(name: str) -> EncoderTask:
    """Return the task of a data set.

    Args:
        name: A key of `SETS`.

    Returns:
        The task.

    Raises:
        InputError: The data set is unknown.
    """
    return _set_named(name).task


def examples(name: str, split: str, root: Path | None = None, limit: int | None = None) -> list[Example]:
    """Read the examples of a data set.

    Rows without a label (below 0, as in the Hub's test splits) are left out.

    Args:
        name: A key of `SETS`.
        split: "train", or the set's `evaluation`.
        root: A folder to read instead of the Hub, with ROOT/NAME/SPLIT.parquet (or .jsonl) in the Hub's columns.
        limit: The number of examples to read, from the first on; None for all.

    Returns:
        The examples: {"input", "target"}, for pairs also "pair"; or SQuAD's {"question", "context", "answers"}.

    Raises:
        InputError: The set is unknown or cannot be read, or its columns, labels or answers are not as expected.
    """
    data_set = _set_named(name)
    read: list[Example] = []
    for number, row in enumerate(hub.rows(data_set.repository, data_set.subset, name, split, root), start=1):
        if len(read) == limit:
            break
        try:
            example = _example(data_set, row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            expected = f"{', '.join(data_set.columns)} and {_expected_target(data_set.task)}"
            raise InputError(f"{name}, {split}, row {number}: expected {expected}, got {_shortened(row)}") from error
        if example is not None:
            read.append(example)
    return read


def _set_named(name: str) -> EncoderSet:
    """Return a data set; raise InputError if it is unknown."""
    if name not in SETS:
        raise InputError(f"tasks: expected some of {', '.join(SETS)}, got {name!r}")
    return SETS[name]


def _expected_target(task: EncoderTask) -> str:
    """Describe a task's targets in an error message."""
    if isinstance(task, Classification):
        return f"a label below {task.outputs}"
    return "a number as label" if isinstance(task, Regression) else "answers with texts and where they start"


def _example(data_set: EncoderSet, row: Mapping[str, Any]) -> Example | None:
    """Turn a row into an example, or None if it has no label. Any exception means that the row does not fit the data set."""
    texts = [_text(row[column]) for column in data_set.columns]
    if isinstance(data_set.task, Span):
        return dict(zip(data_set.columns, texts, strict=True)) | {"answers": _answers(row["answers"])}
    label = row["label"]
    if isinstance(label, bool) or not math.isfinite(label):
        raise ValueError
    if label < 0:
        return None
    target = data_set.task.names[label] if isinstance(data_set.task, Classification) else float(label)
    return {**dict(zip(("input", "pair"), texts, strict=False)), "target": target}


def _answers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check and copy the answers of a question."""
    texts, starts = given["text"], given["answer_start"]
    if not texts or len(texts) != len(starts) or min(starts) < 0 or not all(type(start) is int for start in starts):
        raise ValueError
    return {"text": [_text(text) for text in texts], "answer_start": list(starts)}


def _text(value: Any) -> str:
    """Return a value if it is text, else raise TypeError."""
    if not isinstance(value, str):
        raise TypeError
    return value


def _shortened(row: Any, longest: int = 300) -> str:
    """Show a row in an error message, cut to 300 characters, as contexts are whole paragraphs."""
    text = str(dict(row))
    return text if len(text) <= longest else f"{text[:longest]}..."
