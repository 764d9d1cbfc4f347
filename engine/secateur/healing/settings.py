"""The settings of a healing, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from secateur.support.errors import InputError
from secateur.support.fields import MOST_STEPS, require_count, shown

Targets = Literal["labels", "all", "teacher"]
EPOCHS = 5  # Where neither epochs nor minutes are given.
_OURS = ("output_dir", "max_steps", "num_train_epochs", "learning_rate", "seed", "per_device_train_batch_size")


@dataclass(frozen=True)
class Settings:
    """How a model is healed. The fields are arguments of `heal`."""

    targets: Targets
    epochs: float | None
    minutes: float | None
    blockwise: bool
    hidden_weight: float
    learning_rate: float
    batch_size: int
    patience: int
    seed: int
    max_tokens: int
    lora: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.targets not in get_args(Targets):
            raise InputError(f"targets: expected one of {', '.join(get_args(Targets))}, got {shown(self.targets)}")
        if self.epochs is not None and self.minutes is not None:
            raise InputError(f"epochs: expected epochs or minutes, got both ({self.epochs} and {self.minutes})")
        for name in ("epochs", "minutes"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        require_positive("learning_rate", self.learning_rate)
        if self.hidden_weight != 0:
            require_positive("hidden_weight", self.hidden_weight)
        if not isinstance(self.blockwise, bool):
            raise InputError(f"blockwise: expected True or False, got {shown(self.blockwise)}")
        for name, least, most in (("batch_size", 1, MOST_STEPS), ("patience", 1, MOST_STEPS), ("seed", 0, 2**32 - 1)):
            require_count(name, getattr(self, name), least, most)
        require_count("max_tokens", self.max_tokens)
        if self.lora is not None:
            require_count("lora", self.lora)
        if not isinstance(self.training, Mapping) or any(name in _OURS for name in self.training):
            raise InputError(
                f"training: expected values of TrainingArguments other than {', '.join(_OURS)}, got {shown(self.training)}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {**vars(self), "training": dict(self.training)}


def require_positive(name: str, value: Any) -> None:
    """Raise InputError for an argument that is not a positive, finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and value > 0):
        raise InputError(f"{name}: expected a positive number, got {shown(value)}")
