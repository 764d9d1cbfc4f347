"""Training of a multitask pruning with Hugging Face's Trainer: uniform task sampling, learning-rate groups, the schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Sampler
from transformers import TrainerCallback, TrainingArguments

from secateur.data.examples import Example
from secateur.learned.multitask.encoder_tasks import Feature
from secateur.learned.multitask.model import MultitaskModel
from secateur.learned.multitask.pruning import MultitaskPruning
from secateur.support.compat import train_batch_size
from secateur.support.errors import InputError
from secateur.support.progress import Progress
from secateur.support.trainer import QuietTrainer, learning_rates_of, require_accelerate
from secateur.tasks.batches import model_device, pad
from secateur.tasks.metrics import Evaluation

# The paper's learning rates by parameter group (Xia and Shin 2021, arXiv 2112.05705, section 4).
LEARNING_RATES = {"weights": 3e-5, "scores": 1e-2, "sigma": 5e-3}


class UniformTasks(Sampler[list[int]]):
    """A batch sampler that draws a task uniformly for each batch, whatever the tasks' sizes.

    A task's examples come in random order. When they run out, a new order is drawn. Batch k is the same in every iteration, so
    a resumed run sees the same batches as an uninterrupted one.

    Args:
        sizes: The number of examples of each task. Examples are numbered from one task to the next.
        batch_size: The number of examples in a batch.
        batches: The number of batches.
        seed: The seed of the draws.

    Raises:
        InputError: There are no tasks, or a task has no examples.

    References:
        Xia and Shin 2021, arXiv 2112.05705 (a task is drawn uniformly at each step).
    """

    drop_last = True  # Accelerate reads this attribute: there is no last, smaller batch.

    def __init__(self, sizes: Sequence[int], batch_size: int, batches: int, seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise InputError(f"sizes: expected at least one example of every task, got {list(sizes)}")
        self.sizes, self.batch_size, self.batches, self.seed = list(sizes), batch_size, batches, seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        starts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        queues: list[list[int]] = [[] for _ in self.sizes]  # by task, its next examples
        for _ in range(self.batches):
            task = int(torch.randint(len(self.sizes), (), generator=generator))
            while len(queues[task]) < self.batch_size:
                queues[task] += torch.randperm(self.sizes[task], generator=generator).tolist()
            batch, queues[task] = queues[task][: self.batch_size], queues[task][self.batch_size :]
            yield [starts[task] + row for row in batch]


def collate(model: MultitaskModel, padding: int, task: str, features: Sequence[Feature]) -> dict[str, Any]:
    """Turn features of one task into keyword arguments of the model's forward pass, on the CPU.

    Args:
        model: The model.
        padding: The id of the padding piece.
        task: The task's name.
        features: The features.

    Returns:
        "task", "input_ids", "attention_mask" and, if the features have them, "token_type_ids" (int64 [B, T]), and "labels" as
        `EncoderTask.labels` builds them.
    """
    cpu = torch.device("cpu")
    batch = {
        "task": task,
        "input_ids": pad([feature["input_ids"] for feature in features], padding, cpu),
        "attention_mask": pad([[1] * len(feature["input_ids"]) for feature in features], 0, cpu),
        "labels": model.tasks[task].labels([feature["label"] for feature in features], cpu),
    }
    if "token_type_ids" in features[0]:
        batch["token_type_ids"] = pad([feature["token_type_ids"] for feature in features], 0, cpu)
    return batch


def features_of(
    model: MultitaskModel, tokenizer: Any, examples: Mapping[str, Sequence[Example]], max_length: int
) -> dict[str, list[Feature]]:
    """Tokenise the examples of all tasks.

    Args:
        model: The model.
        tokenizer: The tokenizer.
        examples: The examples by task.
        max_length: The largest number of pieces of a feature. Longer texts are cut.

    Returns:
        The features by task, in the model's order of tasks.

    Raises:
        InputError: The tasks are not the model's, or an example does not fit its task.
    """
    if set(examples) != set(model.tasks):
        raise InputError(f"examples: expected those of the tasks {', '.join(model.tasks)}, got {', '.join(examples)}")
    features = {}
    for name, task in model.tasks.items():
        try:
            features[name] = task.features(tokenizer, examples[name], max_length)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return features


def train(
    pruning: MultitaskPruning,
    features: Mapping[str, Sequence[Feature]],
    arguments: TrainingArguments,
    *,
    tokenizer: Any,
    learning_rates: Mapping[str, float] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train and prune in place.

    Each step trains a batch of one task, which is drawn uniformly. The masks are chosen before the first step and after every
    step.

    Args:
        pruning: The masked model.
        features: The features by task, from `features_of`.
        arguments: Hugging Face's TrainingArguments, with max_steps set. The Trainer handles checkpoints, mixed precision,
            gradient accumulation, several devices and logging.
        tokenizer: The tokenizer, which knows the padding piece.
        learning_rates: The learning rates of "weights" (default arguments.learning_rate), "scores" (default 1e-2) and "sigma"
            (default 5e-3).
        resume: Continue from the last checkpoint in arguments.output_dir, if there is one. The final masks are the same as
            those of an uninterrupted run.
        progress: True for a progress bar, or a function of (steps done, all steps).

    Returns:
        The Trainer's log. Each entry also holds "density".

    Raises:
        InputError: max_steps is not set, a group of learning rates is unknown, or accelerate is not installed.

    References:
        Xia and Shin 2021, arXiv 2112.05705, section 4 (learning rates).
    """
    require_accelerate()
    if arguments.max_steps < 1:
        raise InputError(f"max_steps: expected at least 1, got {arguments.max_steps}")
    rates = learning_rates_of({**LEARNING_RATES, "weights": arguments.learning_rate}, learning_rates)
    trainer = _Trainer(pruning, features, arguments, tokenizer, rates, progress)
    return trainer.run(resume=resume)


def evaluate_task(
    model: MultitaskModel,
    task: str,
    examples: Sequence[Example],
    features: Sequence[Feature],
    tokenizer: Any,
    *,
    max_tokens: int = 8192,
) -> Evaluation:
    """Evaluate a model on one task, in eval mode and with its current masks. Its modes are restored.

    Args:
        model: The model.
        task: The task's name.
        examples: The evaluation examples.
        features: Their features.
        tokenizer: The tokenizer, which knows the padding piece.
        max_tokens: The largest number of padded tokens in a batch; a batch has at least one feature.

    Returns:
        The task's metric with its 95% interval.
    """
    device, training = model_device(model), {module: module.training for module in model.modules()}
    # The longest features come first, so that a batch has features of similar length.
    order = sorted(range(len(features)), key=lambda row: -len(features[row]["input_ids"]))
    logits: list[Tensor] = [torch.empty(0)] * len(features)
    model.eval()
    try:
        while order:
            size = max(1, max_tokens // len(features[order[0]]["input_ids"]))
            rows, order = order[:size], order[size:]
            batch = collate(model, tokenizer.pad_token_id, task, [features[row] for row in rows])
            on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            with torch.inference_mode():
                batch_logits = model(**on_device).logits.cpu()  # [B, outputs] or [B, T, outputs]
            for row, row_logits in zip(rows, batch_logits, strict=True):
                logits[row] = row_logits[: len(features[row]["input_ids"])] if model.tasks[task].by_token else row_logits
    finally:
        for module, mode in training.items():
            module.training = mode
    return model.tasks[task].score(examples, features, logits)


class _Trainer(QuietTrainer):
    """A Trainer with the batches, the parameter groups and the schedule of a multitask pruning."""

    def __init__(
        self,
        pruning: MultitaskPruning,
        features: Mapping[str, Sequence[Feature]],
        arguments: TrainingArguments,
        tokenizer: Any,
        learning_rates: Mapping[str, float],
        progress: Progress | None,
    ) -> None:
        self.features, self.learning_rates, self.padding = features, learning_rates, tokenizer.pad_token_id
        super().__init__(pruning, arguments, progress, train_dataset=_Rows(features), callbacks=[_Schedule(pruning)])

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Build the loader of batches from `UniformTasks`."""
        args = self.args
        batches = args.max_steps * args.gradient_accumulation_steps * args.world_size
        sampler = UniformTasks([len(rows) for rows in self.features.values()], train_batch_size(self), batches, args.seed)
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset, batch_sampler=sampler, collate_fn=self._collate, num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        )  # fmt: skip
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the arguments' optimizer with the pruning's parameter groups."""
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = self.model.parameter_groups(self.learning_rates, self.args.weight_decay)
        optimizer: torch.optim.Optimizer = cls(groups, **options)
        self.optimizer = optimizer
        return optimizer

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add the current density."""
        super().log({**logs, "density": self.pruning.reached}, *arguments, **options)

    def _collate(self, rows: Sequence[tuple[str, Feature]]) -> dict[str, Any]:
        """Build a batch; all rows are of one task."""
        return collate(self.pruning, self.padding, rows[0][0], [feature for _, feature in rows])

    @property
    def pruning(self) -> MultitaskPruning:
        """The pruning, without the wrappers that Accelerate puts around the model."""
        pruning: MultitaskPruning = self.accelerator.unwrap_model(self.model)
        return pruning


class _Rows(ConcatDataset[tuple[str, Feature]]):
    """The features of all tasks, one task after another, as pairs of a task's name and a feature."""

    def __init__(self, features: Mapping[str, Sequence[Feature]]) -> None:
        super().__init__([[(name, feature) for feature in rows] for name, rows in features.items()])  # type: ignore[misc]


class _Schedule(TrainerCallback):  # type: ignore[misc]
    """Choose the masks before the first step and after every step, so that they always fit the current weights."""

    def __init__(self, pruning: MultitaskPruning) -> None:
        self.pruning = pruning

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruning.update_masks_(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruning.update_masks_(state.global_step, state.max_steps)
