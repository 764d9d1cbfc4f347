"""The Trainer's arguments for language models and taggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from secateur.support.trainer import trainer_arguments


def ldnet_arguments(folder: Path, device: str, **given: Any) -> TrainingArguments:
    """Build the Trainer's arguments for LSTMs: gradient norms clipped at 5, a constant learning rate.

    Args:
        folder: The output directory, where checkpoints go.
        device: The device's name; "cpu" makes the Trainer use the CPU.
        given: Values for transformers.TrainingArguments. They override the defaults.

    Returns:
        The arguments.

    Raises:
        InputError: As in `trainer_arguments`.
    """
    defaults: dict[str, Any] = {
        "remove_unused_columns": False, "max_grad_norm": 5.0, "lr_scheduler_type": "constant",
        # Every process reads its own data.
        "accelerator_config": {"dispatch_batches": False},
    }  # fmt: skip
    return trainer_arguments(folder, device, {**defaults, **given})
