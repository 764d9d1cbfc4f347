"""write_folder: the folder of a pruned model, with its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.flow.loaded import TASK_FILE, task_file
from secateur.measuring.benchmark import Report
from secateur.measuring.plots import benchmark_plot, model_name
from secateur.model.offloading import copy_of
from secateur.pruning.save import save
from secateur.tasks import Task


def write_folder(
    pruned: nn.Module,
    out: str | Path,
    *,
    task: Task,
    task_name: str,
    tokenizer: Any,
    stored: torch.dtype,
    document: Mapping[str, Any],
    report: Report,
    files: Mapping[str, str | bytes],
) -> None:
    """Write the model's folder. It appears when complete.

    Args:
        pruned: The model. It is left untouched.
        out: The folder, which must not exist yet.
        task: Its task.
        task_name: The name of the task, by which later commands know it; empty to leave that file out.
        tokenizer: The tokenizer or image processor.
        stored: The dtype of the written weights.
        document: The content of report.json.
        report: The timings, which are plotted.
        files: Further files by name.

    Raises:
        InputError: As `save` does.
    """
    extra: dict[str, str | bytes] = {TASK_FILE: task_file(task, task_name)} if task_name else {}
    extra["report.json"] = json.dumps(document, indent=1) + "\n"
    extra["benchmark.png"] = benchmark_plot(
        report, f"{model_name(pruned)}, {task_name or type(task).__name__}: dense against pruned"
    )
    as_stored = all(parameter.dtype == stored for parameter in pruned.parameters())
    save(pruned if as_stored else copy_of(pruned).to(stored), out, tokenizer=tokenizer, extra={**extra, **files})


def round_weights_(model: nn.Module, stored: torch.dtype) -> None:
    """Round a model's weights in place to the values that a folder of dtype `stored` holds. Each keeps its own dtype.

    Buffers stay as they are, because a folder does not hold them: rotary frequencies are float32 in models of any dtype.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).to(parameter.dtype)
