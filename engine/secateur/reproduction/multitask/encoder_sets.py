"""The nine data sets of multitask pruning (GLUE and SQuAD) from the Hub as examples of an encoder's tasks."""

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
    """repository, subset: on the Hub. columns: its texts, of which a classification's or regression's are "input" and "pair".
    evaluation: the split that a task is evaluated on."""

    repository: str
    subset: str
    columns: tuple[str, ...]
    task: EncoderTask
    evaluation: str = "validation"


GLUE = "nyu-mll/glue"
ENTAILMENT = ("entailment", "not_entailment")
# Names stand at the numbers that the Hub's labels have.
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
# The two settings of Xia and Shin 2021 (arXiv 2112.05705).
THREE = ("mnli", "qqp", "squad")
NINE = tuple(SETS)


def task(name: str) -> EncoderTask:
    """What is learned from a data set. Raises InputError for an unknown one."""
    return _known(name).task


def examples(name: str, split: str, root: Path | None = None, limit: int | None = None) -> list[Example]:
    """The examples of a split ("train", or the set's `evaluation`): {"input", "target"}, of pairs also "pair", or SQuAD's
    {"question", "context", "answers"}. Rows without a label (below 0, in the Hub's test splits) are left out.

    root: a folder with ROOT/NAME/SPLIT.parquet (or .jsonl) in the Hub's columns, instead of the Hub. limit: take the first
    that many.
    Raises InputError: an unknown set; one that cannot be had; columns, labels or answers that are not the set's.
    """
    known = _known(name)
    found: list[Example] = []
    for number, row in enumerate(hub.rows(known.repository, known.subset, name, split, root), start=1):
        if len(found) == limit:
            break
        try:
            example = _example(known, row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            wanted = f"{', '.join(known.columns)} and {_wanted(known.task)}"
            raise InputError(f"{name}, {split}, row {number}: expected {wanted}, got {_shown(row)}") from error
        if example is not None:
            found.append(example)
    return found


def _known(name: str) -> EncoderSet:
    if name not in SETS:
        raise InputError(f"tasks: expected some of {', '.join(SETS)}, got {name!r}")
    return SETS[name]


def _wanted(task: EncoderTask) -> str:
    if isinstance(task, Classification):
        return f"a label below {task.outputs}"
    return "a number as label" if isinstance(task, Regression) else "answers with texts and where they start"


def _example(known: EncoderSet, row: Mapping[str, Any]) -> Example | None:
    """The example of a row, None without a label. Any error says that the row is not the set's."""
    texts = [_text(row[column]) for column in known.columns]
    if isinstance(known.task, Span):
        return dict(zip(known.columns, texts, strict=True)) | {"answers": _answers(row["answers"])}
    label = row["label"]
    if isinstance(label, bool) or not math.isfinite(label):
        raise ValueError
    if label < 0:
        return None
    target = known.task.names[label] if isinstance(known.task, Classification) else float(label)
    return {**dict(zip(("input", "pair"), texts, strict=False)), "target": target}


def _answers(given: Mapping[str, Any]) -> dict[str, Any]:
    texts, starts = given["text"], given["answer_start"]
    if not texts or len(texts) != len(starts) or min(starts) < 0 or not all(type(start) is int for start in starts):
        raise ValueError
    return {"text": [_text(text) for text in texts], "answer_start": list(starts)}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _shown(row: Any, most: int = 300) -> str:
    """The row, cut where it is long: a context is a paragraph."""
    text = str(dict(row))
    return text if len(text) <= most else f"{text[:most]}..."
