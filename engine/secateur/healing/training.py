"""End-to-end distillation with Hugging Face's Trainer, which keeps the weights that are best on held-out examples."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from secateur.healing.clock import Clock
from secateur.healing.length_batches import LengthBatches
from secateur.healing.lessons import Lessons
from secateur.model.undisturbed import undisturbed
from secateur.support.compat import train_batch_size
from secateur.support.errors import InputError
from secateur.support.progress import Progress
from secateur.support.trainer import QuietTrainer, trainer_arguments

METRIC = "eval_divergence"  # The Trainer wants this beginning.


@dataclass(frozen=True)
class Course:
    """What a training did.

    Attributes:
        weights: The file of the best weights; None where no evaluation was better than the start.
        steps: The number of steps.
        history: The steps and the divergences of all evaluations.
    """

    weights: Path | None
    steps: int
    history: list[tuple[int, float]]


class Distillation(nn.Module):
    """The pruned model as the Trainer trains it: its forward pass returns the loss of some lessons.

    Args:
        student: The pruned model.
        lessons: The lessons, which hold the teacher: the Trainer saves and spreads the pruned model alone.
        hidden_weight: The weight of the states behind blocks in the loss.
    """

    def __init__(self, student: nn.Module, lessons: Lessons, hidden_weight: float) -> None:
        super().__init__()
        self.student, self.lessons, self.hidden_weight = student, lessons, hidden_weight

    def forward(self, numbers: Tensor) -> dict[str, Tensor]:
        """Return the loss of the items of some numbers (int64 [B])."""
        return {"loss": self.lessons.loss(self.student, numbers.tolist(), self.hidden_weight)}

    def train(self, mode: bool = True) -> Distillation:
        """Set the mode of the module itself. The pruned model stays in eval mode: dropout makes healing far worse."""
        super().train(mode)
        self.student.eval()
        return self


def arguments_for(
    folder: Path, device: str, steps: int, interval: int, given: Mapping[str, Any], **own: Any
) -> TrainingArguments:
    """Return the Trainer's arguments: it evaluates and saves every `interval` steps.

    Args:
        folder: The folder of checkpoints.
        device: The device's name.
        steps: The number of steps.
        interval: The steps between two evaluations.
        given: The caller's values for TrainingArguments, which win.
        own: Further values.

    Raises:
        InputError: As `trainer_arguments`.
    """
    defaults = {
        "max_steps": steps, "eval_strategy": "steps", "eval_steps": interval, "save_strategy": "steps", "save_steps": interval,
        # The best checkpoint and the last one.
        "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": METRIC, "greater_is_better": False,
        "lr_scheduler_type": "cosine", "warmup_steps": max(1, steps // 20), "logging_steps": interval,
    }  # fmt: skip
    return trainer_arguments(folder, device, {**defaults, **own, **given})


def train(
    distillation: Distillation,
    held_out: Lessons,
    arguments: TrainingArguments,
    *,
    patience: int,
    clock: Clock,
    progress: Progress | None,
) -> Course:
    """Train the pruned model in place, from the last checkpoint in the arguments' folder if there is one.

    Args:
        distillation: The pruned model with its lessons.
        held_out: The lessons that it is evaluated on.
        arguments: The Trainer's arguments, from `arguments_for`.
        patience: The evaluations without a better one after which the training ends.
        clock: The clock, at whose end the training stops.
        progress: True for a progress bar, or a function of (steps done, all steps).

    Returns:
        What was done. The pruned model holds the best weights of the evaluations.

    Raises:
        InputError: As `QuietTrainer`; or the checkpoint of the best weights is gone.
    """
    trainer = _Trainer(distillation, arguments, progress, held_out, patience, clock)
    log = trainer.run(resume=True)
    history = [(row["step"], row[METRIC]) for row in log if METRIC in row]
    best = trainer.state.best_model_checkpoint
    if best is None and any(math.isfinite(divergence) for _, divergence in history):
        raise InputError(
            f"checkpoints: expected the best weights of the run in {str(arguments.output_dir)!r}, got none; delete the "
            "folder to begin anew"
        )
    return Course(None if best is None else Path(best) / "model.safetensors", trainer.state.global_step, history)


class _Trainer(QuietTrainer):
    """A Trainer whose batches are numbers of lessons, and whose evaluation is the divergence on held-out lessons."""

    control: Any

    def __init__(
        self,
        distillation: Distillation,
        arguments: TrainingArguments,
        progress: Progress | None,
        held_out: Lessons,
        patience: int,
        clock: Clock,
    ) -> None:
        self._held_out, self._lessons = held_out, distillation.lessons
        self._limits, self._clock = _Limits(patience, clock), clock
        numbers = list(range(len(distillation.lessons.items)))
        super().__init__(
            distillation, arguments, progress, callbacks=[self._limits], train_dataset=numbers, eval_dataset=[0],
            data_collator=lambda rows: {"numbers": torch.tensor(rows)},
        )  # fmt: skip

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Build the loader of batches from `LengthBatches`."""
        args = self.args
        batches = args.max_steps * args.gradient_accumulation_steps * args.world_size
        lengths = [item.length for item in self._lessons.items]
        sampler = LengthBatches(lengths, train_batch_size(self), batches, args.seed)
        loader: DataLoader[Any] = DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Train, unless the checkpoint that the training goes on from was its end already."""
        if self._limits.ended(self.state):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Measure the divergence on the held-out lessons."""
        began, student = time.monotonic(), self.accelerator.unwrap_model(self.model).student
        with undisturbed(student):
            measured = {METRIC: self._held_out.divergence(student, trained=True)}
        self.log({**measured, "seconds": self._clock.seconds})  # A resumed run goes on from these.
        self._limits.seconds = time.monotonic() - began
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, measured)
        return measured


class _Limits(TrainerCallback):  # type: ignore[misc]
    """End the training when its time is over, or when it has not become better for a while.

    The log of evaluations tells how long, because checkpoints hold it.
    """

    def __init__(self, patience: int, clock: Clock) -> None:
        self._patience, self._clock = patience, clock
        self.seconds = 0.0  # What an evaluation takes.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        used = [row["seconds"] for row in state.log_history if "seconds" in row]
        if used:
            self._clock.continue_from(used[-1])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._clock.over(self.seconds):
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ended(state):
            control.should_training_stop = True

    def ended(self, state: Any) -> bool:
        """Return whether the last evaluations were no better than an earlier one."""
        values = [row[METRIC] for row in state.log_history if METRIC in row]
        return bool(values) and len(values) - 1 - values.index(min(values)) >= self._patience
