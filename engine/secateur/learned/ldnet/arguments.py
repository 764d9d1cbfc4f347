"""The arguments of Hugging Face's Trainer for language models and taggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from secateur.learned.shared.trainer import trainer_arguments


def ldnet_arguments(folder: Path, device: str, **given: Any) -> TrainingArguments:
    """The given arguments over those of `trainer_arguments` and what LSTMs are trained with. Raises InputError as that does."""
    defaults: dict[str, Any] = {
        "remove_unused_columns": False, "max_grad_norm": 5.0, "lr_scheduler_type": "constant",
        # Each process reads for itself.
        "accelerator_config": {"dispatch_batches": False},
    }  # fmt: skip
    return trainer_arguments(folder, device, {**defaults, **given})
