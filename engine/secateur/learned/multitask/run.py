"""One run of multitask pruning, from an encoder and its tasks' examples to scores; it goes on where it was killed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from secateur.data.examples import Example
from secateur.learned.multitask.encoder_tasks import EncoderTask, Feature
from secateur.learned.multitask.model import MultitaskModel, encoder_of
from secateur.learned.multitask.pruning import MultitaskPruning, attribution_scores
from secateur.learned.multitask.training import collate, evaluate_task, features_of, train
from secateur.learned.shared.trainer import Progress
from secateur.support.errors import InputError
from secateur.tasks.batches import model_device
from secateur.tasks.metrics import Evaluation

# As many examples of each task as attribution scores are made from.
ATTRIBUTED = 64


@dataclass(frozen=True)
class TaskData:
    """A task with its training examples, and others to evaluate on."""

    task: EncoderTask
    train: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Prepared:
    """A pruning before its first step, and all tasks' examples tokenised: what could be wrong with them has been found."""

    pruning: MultitaskPruning
    tokenizer: Any
    data: Mapping[str, TaskData]
    features: dict[str, list[Feature]]
    tested: dict[str, list[Feature]]


@dataclass(frozen=True)
class Run:
    """A trained pruning, the metric of each task that has examples for it, and the Trainer's log."""

    pruning: MultitaskPruning
    evaluations: dict[str, Evaluation]
    log: list[dict[str, Any]]
    seconds: float


def prepare(
    encoder: nn.Module, tokenizer: Any, data: Mapping[str, TaskData], *, max_length: int = 128, **pruning: Any
) -> Prepared:
    """What `run` needs. pruning: of `MultitaskPruning`. Raises InputError as that does, and where a row does not fit."""
    made = MultitaskPruning(encoder, {name: each.task for name, each in data.items()}, **pruning)
    features = features_of(made, tokenizer, {name: each.train for name, each in data.items()}, max_length)
    tested: dict[str, list[Feature]] = {}
    for name, each in data.items():
        try:
            tested[name] = each.task.features(tokenizer, each.test, max_length) if each.test else []
        except InputError as error:
            raise InputError(f"{name}, eval: {error}") from error
    return Prepared(made, tokenizer, data, features, tested)


def run(
    prepared: Prepared,
    arguments: TrainingArguments,
    *,
    learning_rates: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Prunes while it trains, and evaluates on the examples that there are. Checkpoints in arguments.output_dir are gone on
    from, and stay."""
    start = time.perf_counter()
    pruning, tokenizer = prepared.pruning.to(arguments.device), prepared.tokenizer
    log = train(
        pruning, prepared.features, arguments, tokenizer=tokenizer, learning_rates=learning_rates, resume=True,
        progress=progress,
    )  # fmt: skip
    evaluations = {
        name: evaluate_task(pruning, name, each.test, prepared.tested[name], tokenizer)
        for name, each in prepared.data.items()
        if each.test
    }
    return Run(pruning, evaluations, log, time.perf_counter() - start)


def scores_from(
    trained: MultitaskModel,
    encoder: nn.Module,
    tokenizer: Any,
    data: Mapping[str, TaskData],
    *,
    granularity: str,
    max_length: int,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Attribution scores, by linear layer, from a trained multitask model of an encoder and the first examples of its tasks.
    Raises InputError where it is one of another encoder or of other tasks."""
    tasks = {name: each.task for name, each in data.items()}
    if trained.tasks != tasks:
        raise InputError(f"initial_scores: expected a model of the tasks {_described(tasks)}, got {_described(trained.tasks)}")
    ours, theirs = ({n: t.shape for n, t in each.state_dict().items()} for each in (encoder_of(encoder), trained.encoder))
    if ours != theirs:
        raise InputError("initial_scores: expected a model with an encoder of the same shapes, got one with others")
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


def _described(tasks: Mapping[str, EncoderTask]) -> str:
    return json.dumps({name: task.to_json() for name, task in tasks.items()})
