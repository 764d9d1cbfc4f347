"""The paper's six data sets from the Hub (GLUE and SuperGLUE) as text-to-text examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from secateur.data.examples import Example
from secateur.reproduction.shared import hub
from secateur.support.errors import InputError


@dataclass(frozen=True)
class DataSet:
    """repository, subset: on the Hub. fields: its columns of text, each with its name before it. labels: by class number."""

    repository: str
    subset: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]


# As in the T5 paper (Raffel et al. 2020, arXiv 1910.10683, appendix D): the set's name first, and words as labels.
SETS = {
    "sst2": DataSet("nyu-mll/glue", "sst2", ("sentence",), ("negative", "positive")),
    "mrpc": DataSet("nyu-mll/glue", "mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "boolq": DataSet("aps/super_glue", "boolq", ("question", "passage"), ("False", "True")),
    "qnli": DataSet("nyu-mll/glue", "qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    "cb": DataSet("aps/super_glue", "cb", ("hypothesis", "premise"), ("entailment", "contradiction", "neutral")),
    "rte": DataSet("nyu-mll/glue", "rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
}


def examples(name: str, split: str, root: Path | None = None) -> list[Example]:
    """The examples of a split ("train" or "validation") of a data set.

    root: a folder with ROOT/NAME/SPLIT.parquet (or .jsonl) in the Hub's columns, instead of the Hub.
    Raises InputError: an unknown set; one that cannot be had; columns or labels that are not the set's.
    """
    if name not in SETS:
        raise InputError(f"tasks: expected some of {', '.join(SETS)}, got {name!r}")
    known = SETS[name]
    found = []
    for number, row in enumerate(hub.rows(known.repository, known.subset, name, split, root), start=1):
        try:
            words = " ".join(f"{column}: {str(row[column]).strip()}" for column in known.fields)
            target = known.labels[row["label"]] if row["label"] >= 0 else None
        except (KeyError, IndexError, TypeError) as error:
            wanted = f"{', '.join(known.fields)} and a label below {len(known.labels)}"
            raise InputError(f"{name}, {split}, row {number}: expected {wanted}, got {dict(row)}") from error
        if target is not None:  # The Hub's test splits have no labels.
            found.append({"input": f"{name} {words}", "target": target})
    return found
