"""The six data sets of the paper (from GLUE and SuperGLUE, on the Hub) as text-to-text examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from secateur.data.examples import Example
from secateur.reproduction.shared import hub
from secateur.support.errors import InputError


@dataclass(frozen=True)
class DataSet:
    """A data set on the Hub.

    Args:
        repository: The repository's name.
        subset: The subset's name.
        fields: The text columns. In the input text, a column's name stands before its text.
        labels: The labels by class number.
    """

    repository: str
    subset: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]


# The format of the T5 paper (Raffel et al. 2020, arXiv 1910.10683, appendix D): inputs start with the set's name, and labels
# are words.
SETS = {
    "sst2": DataSet("nyu-mll/glue", "sst2", ("sentence",), ("negative", "positive")),
    "mrpc": DataSet("nyu-mll/glue", "mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "boolq": DataSet("aps/super_glue", "boolq", ("question", "passage"), ("False", "True")),
    "qnli": DataSet("nyu-mll/glue", "qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    "cb": DataSet("aps/super_glue", "cb", ("hypothesis", "premise"), ("entailment", "contradiction", "neutral")),
    "rte": DataSet("nyu-mll/glue", "rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
}


def examples(name: str, split: str, root: Path | None = None) -> list[Example]:
    """Read the examples of a data set.

    Args:
        name: A key of `SETS`.
        split: "train" or "validation".
        root: A folder to read instead of the Hub, with ROOT/NAME/SPLIT.parquet (or .jsonl) in the Hub's columns.

    Returns:
        The examples with a label, as {"input": text, "target": label}.

    Raises:
        InputError: The set is unknown or cannot be read, or its columns or labels are not as expected.
    """
    if name not in SETS:
        raise InputError(f"tasks: expected some of {', '.join(SETS)}, got {name!r}")
    data_set = SETS[name]
    read: list[Example] = []
    for number, row in enumerate(hub.rows(data_set.repository, data_set.subset, name, split, root), start=1):
        try:
            text = " ".join(f"{column}: {str(row[column]).strip()}" for column in data_set.fields)
            target = data_set.labels[row["label"]] if row["label"] >= 0 else None
        except (KeyError, IndexError, TypeError) as error:
            expected = f"{', '.join(data_set.fields)} and a label below {len(data_set.labels)}"
            raise InputError(f"{name}, {split}, row {number}: expected {expected}, got {dict(row)}") from error
        if target is not None:  # The Hub's test splits have label -1.
            read.append({"input": f"{name} {text}", "target": target})
    return read
