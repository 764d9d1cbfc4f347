"""The files beside an exported model: its tokenizer, its config and its task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from secateur.exporting.base import Source
from secateur.pruning.describe import stock_class
from secateur.tasks.task_file import TASK_FILE

ONE_PASS = "one pass without a cache of keys and values: for scores of given labels; generation repeats the whole pass"


def write_companions(source: Source, folder: Path, *, config: bool = True) -> None:
    """Write the tokenizer, and where there are such, the names of classes, the settings of generation and the task's labels.

    Args:
        source: The model.
        folder: The folder.
        config: Whether to write config.json. It names no code, as the folder holds none.
    """
    model: Any = source.model
    source.tokenizer.save_pretrained(folder)
    if (source.place / TASK_FILE).is_file():
        shutil.copyfile(source.place / TASK_FILE, folder / TASK_FILE)
    if not config:
        return
    content = {name: value for name, value in model.config.to_dict().items() if name not in ("auto_map", "secateur")}
    content["architectures"] = [stock_class(model).__name__]
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def notes_of(model: Any) -> list[str]:
    """Return notes on what a model of one pass is for."""
    return [ONE_PASS] if hasattr(model, "generation_config") else []
