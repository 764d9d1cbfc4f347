"""write_folder: the folder of a pruned model, with its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.flow.model_card import CARD_FILE, Making, model_card
from secateur.flow.usage import usage_of
from secateur.measuring.compare import Comparison
from secateur.measuring.plots import benchmark_plot, model_name
from secateur.model.offloading import copy_of
from secateur.pruning.save import save
from secateur.support.files import final_name
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
    comparison: Comparison,
    making: Making,
    files: Mapping[str, str | bytes],
) -> None:
    """Write the model's folder, with its model card. It appears when complete.

    Args:
        pruned: The model. It is left untouched.
        out: The folder, which must not exist yet.
        task: Its task.
        task_name: The name of the task, by which later commands know it; empty to leave that file out.
        tokenizer: The tokenizer or image processor.
        stored: The dtype of the written weights.
        document: The content of report.json.
        comparison: The evaluation, size and speed of the dense and the pruned model. The timings are plotted.
        making: How the model was made, for the card.
        files: Further files by name.

    Raises:
        InputError: As `save` does.
    """
    title = f"{model_name(pruned)}, {task_name or type(task).__name__}: dense against pruned"
    extra: dict[str, str | bytes] = {
        "report.json": json.dumps(document, indent=1) + "\n",
        "benchmark.png": benchmark_plot(comparison.benchmark, title),
        **files,
    }
    images = [name for name in extra if name.endswith(".png")]
    usage = usage_of(pruned, task, final_name(out), named=bool(task_name))
    extra[CARD_FILE] = model_card(pruned, task, usage, making, comparison, images=images)
    as_stored = all(parameter.dtype == stored for parameter in pruned.parameters())
    model = pruned if as_stored else copy_of(pruned).to(stored)
    save(model, out, tokenizer=tokenizer, task=task if task_name else None, extra=extra)


def round_weights_(model: nn.Module, stored: torch.dtype) -> None:
    """Round a model's weights in place to the values that a folder of dtype `stored` holds. Each keeps its own dtype.

    Buffers stay as they are, because a folder does not hold them: rotary frequencies are float32 in models of any dtype.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).to(parameter.dtype)
