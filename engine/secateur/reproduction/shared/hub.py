"""Rows of a data set, from the Hub or from a local copy with the same columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.support.compat import own_code_options
from secateur.support.errors import InputError, first_line


def rows(repository: str, subset: str, name: str, split: str, root: Path | None) -> Any:
    """Read the rows of a split.

    Args:
        repository: The repository on the Hub.
        subset: The subset's name.
        name: The data set's name in the folder `root`.
        split: The split's name.
        root: A folder to read instead of the Hub, with ROOT/NAME/SPLIT.parquet (or .jsonl).

    Returns:
        The rows, which are dicts by column.

    Raises:
        InputError: The data set cannot be loaded, or there is no such file, or it cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    if root is None:
        try:
            return load_dataset(repository, subset, split=split, **own_code_options(load_dataset))
        except (OSError, ValueError, DatasetNotFoundError) as error:
            raise InputError(f"tasks: cannot load {repository} ({subset}): {first_line(error)}") from error
    for suffix, kind in ((".parquet", "parquet"), (".jsonl", "json")):
        path = root / name / f"{split}{suffix}"
        if path.exists():
            try:
                return load_dataset(kind, data_files=str(path), split="train")
            except (OSError, ValueError, DatasetGenerationError) as error:
                raise InputError(f"data-root: cannot read {str(path)!r}: {first_line(error)}") from error
    raise InputError(f"data-root: no such file: {str(root / name / split)!r} with .parquet or .jsonl")
