"""heal: train a pruned model to predict what the dense model predicts, and give back the best weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from secateur.data.examples import Example, Examples
from secateur.healing.blockwise import BlockFit, heal_blocks_
from secateur.healing.clock import Clock
from secateur.healing.healed import Healed
from secateur.healing.lessons import Lessons, Pairs
from secateur.healing.pair import require_pair
from secateur.healing.planned_steps import planned_steps
from secateur.healing.run import Run, run_in
from secateur.healing.settings import Settings, Targets
from secateur.healing.student import adapters_in, best_of, master_copy, require_peft
from secateur.model.discovery import config_digest
from secateur.model.offloading import copy_of, weights_digest
from secateur.model.undisturbed import undisturbed
from secateur.recovery.matching import blocks_of_dense
from secateur.support.errors import InputError
from secateur.support.ledger import ROWS, content_hash
from secateur.support.progress import Progress, require_progress
from secateur.tasks import Task
from secateur.tasks.batches import model_device

if TYPE_CHECKING:
    from secateur.healing.training import Course

logger = logging.getLogger("secateur")
_EVERY = 5  # Every fifth example is held out.
_FEWEST = 10  # With fewer examples, one or none would be held out.
_LONGEST = 64  # Pieces of a text that the teacher writes as a target.


def heal(
    pruned: nn.Module,
    teacher: nn.Module,
    task: Task,
    examples: Examples,
    *,
    targets: Targets = "labels",
    epochs: float | None = None,
    minutes: float | None = None,
    blockwise: bool = True,
    hidden_weight: float = 0.0,
    lora: int | None = None,
    learning_rate: float = 5e-4,
    batch_size: int = 16,
    patience: int = 5,
    seed: int = 0,
    removed_blocks: Collection[str] = (),
    max_tokens: int = 4096,
    checkpoints: str | Path | None = None,
    training: Mapping[str, Any] = MappingProxyType({}),
    progress: Progress | None = None,
) -> Healed:
    """Train a pruned model to predict what the dense model predicts (distillation).

    Each block that lost units is first trained alone, towards the dense states behind it. Then the whole model is trained. The
    loss is the Kullback-Leibler divergence of the pruned model's predictions from the teacher's at the target positions. Every
    fifth example is held out. The divergence on these examples is measured before the training, and about once an epoch. The
    weights with the least divergence are given back; the start counts too, so the result is never worse on them. All weights
    but those of embeddings are trained, in float32 at least, without dropout. Shapes and the config stay as they are. The same
    seed gives the same weights on the same machine, unless `minutes` ends the training.

    Args:
        pruned: The pruned model. It stays unchanged.
        teacher: The dense model that it was pruned from. It stays unchanged.
        task: The task of the examples.
        examples: The examples, as in `attribute`; ten at least.
        targets: Where the targets come from. "labels": the examples' own. "all": all candidate labels of a closed task; the
            examples are then inputs alone. "teacher": what the teacher answers, for open texts its greedy output; the examples
            are then inputs alone.
        epochs: The passes over the examples, 5 where neither `epochs` nor `minutes` is given.
        minutes: The wall-clock time of the call, evaluations included, in place of `epochs`.
        blockwise: Whether each block that lost units is first trained alone, towards the dense states behind it.
        hidden_weight: The weight in the loss of the squared error of the states behind all blocks, relative to the teacher's.
        lora: The rank of adapters (LoRA) in the linear layers of all blocks, which are trained end to end in place of the
            weights, and merged into them. They need PEFT.
        learning_rate: The highest learning rate of AdamW. After a warm-up it falls to 0 by a cosine.
        batch_size: The items of a training step in one process.
        patience: The training ends after that many evaluations without a better one.
        seed: The seed of the order of the examples. There is no dropout.
        removed_blocks: As in `recover_`. Needed with `blockwise` or `hidden_weight`, where the plan removed blocks.
        max_tokens: Padded input tokens in a batch that is evaluated, as in `attribute`.
        checkpoints: A folder of checkpoints. A call with the same arguments goes on from it after a kill, and ends in the same
            weights. It stays at the end.
        training: Further values of transformers.TrainingArguments by name, such as {"bf16": True,
            "gradient_accumulation_steps": 4}.
        progress: True for progress bars, or a function of (done, total): blocks, then training steps.

    Returns:
        The healed model with the divergences.

    Raises:
        InputError: An argument has an unknown value; the examples are unusable or too few; the models do not fit each other, or
            have weights that cannot be trained; the minutes are too few for a step; the folder was begun with other arguments;
            or accelerate is not installed, or, for `lora`, peft.

    References:
        Distillation: Hinton et al. 2015, arXiv 1503.02531. The teacher's own outputs as targets: Thangarasa et al. 2024,
        arXiv 2410.09982. Adapters: Hu et al. 2021, arXiv 2106.09685. States behind blocks: Sun et al. 2019, arXiv 1908.09355.

    Example:
        `healed = secateur.heal(pruned, dense, task, examples, minutes=10)`
    """
    from secateur.support.trainer import require_accelerate  # The Trainer imports `datasets`, which takes a second.

    clock = Clock(minutes)
    settings = Settings(
        targets,
        epochs,
        minutes,
        blockwise,
        hidden_weight,
        learning_rate,
        batch_size,
        patience,
        seed,
        max_tokens,
        lora,
        training,
    )
    require_progress(progress)
    require_accelerate()
    if lora is not None:
        require_peft()
    require_pair(pruned, teacher, task)
    pairs = blocks_of_dense(teacher, pruned, removed_blocks) if blockwise or hidden_weight else []
    with undisturbed(teacher):
        rows = _rows(teacher, task, examples, settings)
        identity = {
            **settings.to_json(), ROWS: content_hash(rows), "pruned": _digest(pruned), "teacher": _digest(teacher),
        }  # fmt: skip
        with run_in(checkpoints, identity) as run:
            return _healed(pruned, teacher, task, rows, pairs, settings, clock, run, progress)


def _rows(teacher: nn.Module, task: Task, examples: Examples, settings: Settings) -> list[Example]:
    """Return the examples with the targets to train on. Raises InputError for too few."""
    rows = task.read(examples, all_labels=settings.targets != "labels")
    if settings.targets == "teacher" and rows:
        told = [row["prediction"] for row in task.predictions(teacher, rows, settings.max_tokens, _LONGEST)]
        read = len(rows)
        rows = [{**row, task.columns[-1]: answer} for row, answer in zip(rows, told, strict=True) if answer != ""]
        if len(rows) < read:
            logger.warning(
                "the teacher answers %d of %d examples with an empty text; they are left out", read - len(rows), read
            )
    if len(rows) < _FEWEST:
        raise InputError(f"examples: expected at least {_FEWEST}, of which every fifth is held out, got {len(rows)}")
    return rows


def _digest(model: nn.Module) -> str:
    """Return a short hash of a model."""
    return f"{config_digest(model)}-{weights_digest(model)}"


def _healed(
    pruned: nn.Module,
    teacher: nn.Module,
    task: Task,
    rows: Sequence[Example],
    pairs: Pairs,
    settings: Settings,
    clock: Clock,
    run: Run,
    progress: Progress | None,
) -> Healed:
    """Carry out the stages: measure the start, train blocks, train all, and give back the best weights."""
    kept_for_test = rows[::_EVERY]
    fitted = [row for number, row in enumerate(rows) if number % _EVERY]
    every_label, max_tokens = settings.targets == "all", settings.max_tokens
    held_out = Lessons(teacher, task, task.items(pruned, kept_for_test, all_labels=every_label), max_tokens=max_tokens)
    lessons = Lessons(
        teacher, task, task.items(pruned, fitted, all_labels=every_label), pairs if settings.hidden_weight else (), max_tokens
    )
    student = master_copy(copy_of(pruned)).eval()
    began = time.monotonic()
    before = _measured(held_out, pruned)
    evaluation = time.monotonic() - began
    fits = _blocks(student, lessons, held_out, pairs, settings, clock, run, progress) if settings.blockwise else []
    if settings.lora is not None:
        adapters_in(student, settings.lora, settings.seed)
    course = _course(student, lessons, held_out, settings, clock, run, evaluation, progress)
    healed = copy_of(pruned) if course.weights is None else best_of(pruned, course.weights, settings.lora)
    after = _measured(held_out, healed)
    if not after < before:
        healed, after = copy_of(pruned), before
    counts = {"fitted": len(fitted), "held_out": len(kept_for_test)}
    return Healed(healed, before, after, course.history, fits, course.steps, clock.seconds, counts, settings.to_json())


def _measured(held_out: Lessons, model: nn.Module) -> float:
    """Return a model's divergence from the teacher on the held-out examples."""
    with undisturbed(model):
        return held_out.divergence(model)


def _blocks(
    student: nn.Module,
    lessons: Lessons,
    held_out: Lessons,
    pairs: Pairs,
    settings: Settings,
    clock: Clock,
    run: Run,
    progress: Progress | None,
) -> list[BlockFit]:
    """Train the blocks alone, once in a run."""

    def compute() -> dict[str, Any]:
        fits = heal_blocks_(
            student, lessons, held_out, pairs, batch_size=settings.batch_size, seed=settings.seed, over=clock.over,
            progress=progress,
        )  # fmt: skip
        return {"fits": [fit.to_json() for fit in fits], "seconds": clock.seconds}

    results = run.once("blocks", compute, student)
    if clock.seconds < results["seconds"]:
        clock.continue_from(results["seconds"])
    return [BlockFit(**fit) for fit in results["fits"]]


def _course(
    student: nn.Module,
    lessons: Lessons,
    held_out: Lessons,
    settings: Settings,
    clock: Clock,
    run: Run,
    evaluation: float,
    progress: Progress | None,
) -> Course:
    """Train the whole model."""
    from secateur.healing.training import Distillation, arguments_for, train

    def plan() -> dict[str, Any]:
        steps, interval = planned_steps(settings, clock, student, lessons, evaluation)
        return {"steps": steps, "interval": interval}

    planned = run.once("steps", plan)
    arguments = arguments_for(
        run.training, model_device(student).type, planned["steps"], planned["interval"], settings.training,
        learning_rate=settings.learning_rate, seed=settings.seed, per_device_train_batch_size=settings.batch_size,
        save_only_model=not run.lasts,
    )  # fmt: skip
    distillation = Distillation(student, lessons, settings.hidden_weight)
    return train(distillation, held_out, arguments, patience=settings.patience, clock=clock, progress=progress)
