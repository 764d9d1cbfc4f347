"""Rows of a data set, from the Hub or from a local copy in the Hub's columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.support.errors import InputError, first_line


def rows(repository: str, subset: str, name: str, split: str, root: Path | None) -> Any:
    """The rows of a split as dicts. root: a folder with ROOT/NAME/SPLIT.parquet (or .jsonl), instead of the Hub.

    Raises InputError: a set that cannot be had, no such file, or one that cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    if root is None:
        try:
            return load_dataset(repository, subset, split=split)
        except (OSError, ValueError, DatasetNotFoundError) as error:
            raise InputError(f"tasks: {repository} ({subset}) cannot be had: {first_line(error)}") from error
    for suffix, kind in ((".parquet", "parquet"), (".jsonl", "json")):
        path = root / name / f"{split}{suffix}"
        if path.exists():
            try:
                return load_dataset(kind, data_files=str(path), split="train")
            except (OSError, ValueError, DatasetGenerationError) as error:
                raise InputError(f"data-root: cannot read {str(path)!r}: {first_line(error)}") from error
    raise InputError(f"data-root: no such file: {str(root / name / split)!r} with .parquet or .jsonl")
