"""One run of multitask pruning, from an encoder and its tasks' examples to scores; it goes on where it was killed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from secateur.data import Example
from secateur.learned.encoder_tasks import EncoderTask
from secateur.learned.multitask import MultitaskPruning, attribution_scores
from secateur.learned.multitask_model import MultitaskModel
from secateur.learned.training import Progress, collate, evaluate_task, features_of, train
from secateur.tasks.base import Evaluation, model_device

# As many examples of each task as attribution scores are made from.
ATTRIBUTED = 64


@dataclass(frozen=True)
class TaskData:
    """A task with its training examples, and others to evaluate on."""

    task: EncoderTask
    train: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Run:
    """A trained pruning, the metric of each task that has examples for it, and the Trainer's log."""

    pruning: MultitaskPruning
    evaluations: dict[str, Evaluation]
    log: list[dict[str, Any]]
    seconds: float


def run(
    encoder: nn.Module,
    tokenizer: Any,
    data: Mapping[str, TaskData],
    arguments: TrainingArguments,
    *,
    max_length: int = 128,
    learning_rates: Mapping[str, float] | None = None,
    progress: Progress | None = None,
    **pruning: Any,
) -> Run:
    """Prunes while it trains, and evaluates. pruning: of `MultitaskPruning`. Checkpoints in arguments.output_dir are gone on
    from, and removed at the end."""
    start = time.perf_counter()
    made = MultitaskPruning(encoder, {name: each.task for name, each in data.items()}, seed=arguments.seed, **pruning)
    made.to(arguments.device)
    features = features_of(made, tokenizer, {name: each.train for name, each in data.items()}, max_length)
    log = train(
        made, features, arguments, tokenizer=tokenizer, learning_rates=learning_rates, resume=True, progress=progress
    )  # fmt: skip
    evaluations = {}
    for name, each in data.items():
        if each.test:
            tested = each.task.features(tokenizer, each.test, max_length)
            evaluations[name] = evaluate_task(made, name, each.test, tested, tokenizer)
    shutil.rmtree(Path(str(arguments.output_dir)), ignore_errors=True)
    return Run(made, evaluations, log, time.perf_counter() - start)


def scores_from(
    trained: MultitaskModel,
    tokenizer: Any,
    data: Mapping[str, TaskData],
    *,
    granularity: str,
    max_length: int,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Attribution scores, by linear layer, from a trained multitask model and the first examples of each of its tasks."""
    opened: Any = {"method": "movement", "granularity": granularity, "density": 1.0}
    pruning = MultitaskPruning(trained.encoder, trained.tasks, pooling=trained.pooling, **opened)
    pruning.heads.load_state_dict(trained.heads.state_dict())
    device = model_device(pruning)

    def batches() -> Any:
        for name in trained.tasks:
            rows = trained.tasks[name].features(tokenizer, data[name].train[:ATTRIBUTED], max_length)
            for row in rows:
                batch = collate(pruning, tokenizer.pad_token_id, name, [row])
                yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    return attribution_scores(pruning, batches(), scale=scale)
