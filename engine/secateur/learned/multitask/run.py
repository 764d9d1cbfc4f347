"""One run of multitask pruning, from an encoder and examples to metrics. A killed run continues from its last checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from secateur.data.examples import Example
from secateur.learned.multitask.encoder_tasks import EncoderTask, Feature
from secateur.learned.multitask.model import MultitaskModel, encoder_of
from secateur.learned.multitask.pruning import MultitaskPruning, attribution_scores
from secateur.learned.multitask.training import collate, evaluate_task, features_of, train
from secateur.support.errors import InputError
from secateur.support.progress import Progress
from secateur.tasks.batches import model_device
from secateur.tasks.metrics import Evaluation

# The number of examples of each task that attribution scores are computed from.
ATTRIBUTED = 64


@dataclass(frozen=True)
class TaskData:
    """A task with its training examples and its evaluation examples (`test`)."""

    task: EncoderTask
    train: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Prepared:
    """A pruning before its first step, and the tokenised examples of all tasks, which have been checked.

    Attributes:
        pruning: The masked model.
        tokenizer: The tokenizer.
        data: The tasks and their examples.
        features: The features of the training examples by task.
        tested: The features of the evaluation examples by task.
    """

    pruning: MultitaskPruning
    tokenizer: Any
    data: Mapping[str, TaskData]
    features: dict[str, list[Feature]]
    tested: dict[str, list[Feature]]


@dataclass(frozen=True)
class Run:
    """The result of a run.

    Attributes:
        pruning: The trained, masked model.
        evaluations: The metric of each task that has evaluation examples.
        log: The Trainer's log.
        seconds: The time of training and evaluation.
    """

    pruning: MultitaskPruning
    evaluations: dict[str, Evaluation]
    log: list[dict[str, Any]]
    seconds: float


def prepare(
    encoder: nn.Module, tokenizer: Any, data: Mapping[str, TaskData], *, max_length: int = 128, **pruning: Any
) -> Prepared:
    """Build a pruning and tokenise all examples, so that errors show before training.

    Args:
        encoder: An encoder, or a model that has one. It is copied.
        tokenizer: The tokenizer.
        data: The tasks and their examples.
        max_length: The largest number of pieces of an example.
        pruning: Further arguments of `MultitaskPruning`.

    Returns:
        The arguments of `run`.

    Raises:
        InputError: As in `MultitaskPruning`, or an example does not fit its task.
    """
    masked = MultitaskPruning(encoder, {name: task_data.task for name, task_data in data.items()}, **pruning)
    features = features_of(masked, tokenizer, {name: task_data.train for name, task_data in data.items()}, max_length)
    tested: dict[str, list[Feature]] = {}
    for name, task_data in data.items():
        try:
            tested[name] = task_data.task.features(tokenizer, task_data.test, max_length) if task_data.test else []
        except InputError as error:
            raise InputError(f"{name}, eval: {error}") from error
    return Prepared(masked, tokenizer, data, features, tested)


def run(
    prepared: Prepared,
    arguments: TrainingArguments,
    *,
    learning_rates: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train and prune, then evaluate the tasks that have evaluation examples.

    Training continues from the last checkpoint in arguments.output_dir, if there is one. Checkpoints are not removed.

    Args:
        prepared: What `prepare` returned.
        arguments: Hugging Face's TrainingArguments, with max_steps set.
        learning_rates: As in `train`.
        progress: As in `train`.

    Returns:
        The result. Its pruning is the one in `prepared`.

    Raises:
        InputError: As in `train`.
    """
    start = time.perf_counter()
    pruning, tokenizer = prepared.pruning.to(arguments.device), prepared.tokenizer
    log = train(
        pruning, prepared.features, arguments, tokenizer=tokenizer, learning_rates=learning_rates, resume=True,
        progress=progress,
    )  # fmt: skip
    evaluations = {
        name: evaluate_task(pruning, name, task_data.test, prepared.tested[name], tokenizer)
        for name, task_data in prepared.data.items()
        if task_data.test
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
    """Compute attribution scores with a trained multitask model, from the first examples of its tasks.

    Args:
        trained: A trained multitask model.
        encoder: The encoder to prune. It must have the tensors and shapes of the trained model's encoder.
        tokenizer: The tokenizer.
        data: The tasks, which must be those of the trained model, and their examples.
        granularity: "element" or "rank".
        max_length: The largest number of pieces of an example.
        scale: The largest score.

    Returns:
        The scores of each linear layer, as in `attribution_scores`.

    Raises:
        InputError: The trained model has another encoder or other tasks.
    """
    tasks = {name: task_data.task for name, task_data in data.items()}
    if trained.tasks != tasks:
        raise InputError(f"initial_scores: expected a model of the tasks {_described(tasks)}, got {_described(trained.tasks)}")
    if _shapes(encoder_of(encoder)) != _shapes(trained.encoder):
        raise InputError("initial_scores: expected a model whose encoder has the same shapes, got other shapes")
    dense_options: Any = {"method": "movement", "granularity": granularity, "density": 1.0}
    pruning = MultitaskPruning(trained.encoder, trained.tasks, pooling=trained.pooling, **dense_options)
    pruning.heads.load_state_dict(trained.heads.state_dict())
    device = model_device(pruning)

    def batches() -> Any:
        for name in trained.tasks:
            rows = trained.tasks[name].features(tokenizer, data[name].train[:ATTRIBUTED], max_length)
            for row in rows:
                batch = collate(pruning, tokenizer.pad_token_id, name, [row])
                yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    return attribution_scores(pruning, batches(), scale=scale)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a model's state."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _described(tasks: Mapping[str, EncoderTask]) -> str:
    """Describe tasks in an error message."""
    return json.dumps({name: task.to_json() for name, task in tasks.items()})
