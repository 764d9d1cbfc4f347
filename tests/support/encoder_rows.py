"""Rows of the GLUE sets and SQuAD with the Hub's columns, and a tokenizer for pairs of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import piece_tokenizer, sentences
from tokenizers.processors import TemplateProcessing

from secateur.learned.multitask.encoder_tasks import Classification
from secateur.reproduction.multitask.encoder_sets import SETS


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    """Build rows with the Hub's columns, also the columns that are not read."""
    known, texts = SETS[name], sentences(2 * count)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {"idx": number, **dict(zip(known.columns, texts[2 * number :], strict=False))}
        if name == "squad":
            words = row["context"].split()
            answers = {"text": [words[-1], words[0]], "answer_start": [row["context"].rindex(words[-1]), 0]}
            rows.append({"id": f"{number:x}", "title": "Cats", **row, "answers": answers})
        elif isinstance(known.task, Classification):
            rows.append(row | {"label": number % known.task.outputs})
        else:
            rows.append(row | {"label": (number % 11) / 2})
    return rows


def write(root: Path, name: str, split: str, rows: Sequence[dict[str, Any]], *, parquet: bool = False) -> None:
    import pyarrow
    import pyarrow.parquet

    (root / name).mkdir(parents=True, exist_ok=True)
    if parquet:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), root / name / f"{split}.parquet")
    else:
        (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair_tokenizer() -> Any:
    tokenizer = piece_tokenizer()
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    return tokenizer
