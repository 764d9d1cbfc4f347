"""How many steps a healing makes, and how often it evaluates: from epochs, or from the time of a step."""

from __future__ import annotations

import math
import os
import time

import torch
import torch.distributed as dist
from torch import nn

from secateur.healing.clock import Clock
from secateur.healing.lessons import Lessons
from secateur.healing.settings import EPOCHS, Settings
from secateur.support.errors import InputError

_MOST_EPOCHS = 40  # More of them improve nothing.
_EVALUATIONS = 5  # So often at least, where less than an epoch fits between them.
_SLACK = 1.15  # Steps of a training take longer than a measured one by the optimizer's part.


def planned_steps(settings: Settings, clock: Clock, student: nn.Module, lessons: Lessons, evaluation: float) -> tuple[int, int]:
    """Return the number of steps, and the steps between two evaluations.

    Args:
        settings: The settings.
        clock: The clock.
        student: The pruned model, of which one step is measured where minutes are given.
        lessons: The lessons.
        evaluation: The seconds of an evaluation.

    Raises:
        InputError: The minutes are too few for a step and its evaluation.
    """
    parts = int(settings.training.get("gradient_accumulation_steps", 1)) * int(os.environ.get("WORLD_SIZE", "1"))
    epoch = max(1, len(lessons.items) // (settings.batch_size * parts))
    if settings.minutes is None:
        steps = max(1, round((EPOCHS if settings.epochs is None else settings.epochs) * epoch))
        interval = min(epoch, steps)
        return _whole(steps, interval)
    step = _SLACK * _seconds_of_step(settings, student, lessons)
    step *= int(settings.training.get("gradient_accumulation_steps", 1))
    left = (clock.left or 0.0) - evaluation
    if left < step:
        needed = (clock.seconds + step + evaluation) / 60
        raise InputError(f"minutes: expected at least {needed:.2g}, for one step and its evaluation, got {settings.minutes}")
    # Evaluations take a third of the time at most.
    interval = min(epoch, max(math.ceil(left / step / _EVALUATIONS), math.ceil(2 * evaluation / step)))
    steps = min(_MOST_EPOCHS * epoch, max(1, int(left / (step + evaluation / interval))))
    return _agreed(_whole(steps, min(interval, steps)))


def _whole(steps: int, interval: int) -> tuple[int, int]:
    """Return whole intervals, so that the last step is evaluated."""
    return steps // interval * interval, interval


def _seconds_of_step(settings: Settings, student: nn.Module, lessons: Lessons) -> float:
    """Measure a forward and a backward pass on the longest items. Gradients are cleared."""
    longest = sorted(range(len(lessons.items)), key=lambda number: -lessons.items[number].length)[: settings.batch_size]
    seconds = 0.0
    for _ in range(2):  # The first one also allocates memory.
        began = time.monotonic()
        torch.autograd.backward(lessons.loss(student, longest, settings.hidden_weight))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        student.zero_grad()
    return seconds


def _agreed(numbers: tuple[int, int]) -> tuple[int, int]:
    """Return the numbers of the first process."""
    if dist.is_available() and dist.is_initialized():
        shared = [numbers]
        dist.broadcast_object_list(shared)
        return shared[0]
    return numbers
