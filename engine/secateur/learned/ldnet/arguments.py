"""The arguments of Hugging Face's Trainer for language models and taggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from secateur.errors import InputError, first_line
from secateur.learned.trainer import require_accelerate


def trainer_arguments(folder: Path, device: str, **given: Any) -> TrainingArguments:
    """The given arguments over secateur's defaults: silent, one checkpoint at a time, on the CPU where the device says so.
    Raises InputError for those that the Trainer refuses."""
    defaults: dict[str, Any] = {
        "save_total_limit": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": device == "cpu",
        "remove_unused_columns": False, "max_grad_norm": 5.0, "lr_scheduler_type": "constant",
        # Each process reads for itself.
        "accelerator_config": {"dispatch_batches": False},
    }  # fmt: skip
    require_accelerate()
    try:
        return TrainingArguments(str(folder), **{**defaults, **given})
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"training: {first_line(error)}") from error
