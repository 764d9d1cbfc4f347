"""Training of a multitask pruning by Hugging Face's Trainer: uniform task sampling, groups of learning rates, the schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Sampler
from transformers import TrainerCallback, TrainingArguments

from secateur.data.examples import Example
from secateur.learned.multitask.encoder_tasks import Feature
from secateur.learned.multitask.model import MultitaskModel
from secateur.learned.multitask.pruning import MultitaskPruning
from secateur.learned.shared.trainer import Progress, QuietTrainer, last_checkpoint, require_accelerate
from secateur.support.compat import train_batch_size
from secateur.support.errors import InputError
from secateur.tasks.batches import model_device, pad
from secateur.tasks.metrics import Evaluation

# Of the paper, by group (arXiv 2112.05705, section 4).
LEARNING_RATES = {"weights": 3e-5, "scores": 1e-2, "sigma": 5e-3}


class UniformTasks(Sampler[list[int]]):
    """Batches of one task each: the task is drawn uniformly, whatever its size, and its examples follow one another in an order
    that is drawn anew each time they run out.

    sizes: examples of each task, whose numbers follow one another. Batch k is the same whenever the sampler is iterated, so
    that a run that goes on sees what it would have seen.
    """

    drop_last = True  # What Accelerate asks a batch sampler for: there is no last, smaller batch.

    def __init__(self, sizes: Sequence[int], batch_size: int, batches: int, seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise InputError(f"sizes: expected an example of each task at least, got {list(sizes)}")
        self.sizes, self.batch_size, self.batches, self.seed = list(sizes), batch_size, batches, seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        starts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        waiting: list[list[int]] = [[] for _ in self.sizes]
        for _ in range(self.batches):
            task = int(torch.randint(len(self.sizes), (), generator=generator))
            while len(waiting[task]) < self.batch_size:
                waiting[task] += torch.randperm(self.sizes[task], generator=generator).tolist()
            batch, waiting[task] = waiting[task][: self.batch_size], waiting[task][self.batch_size :]
            yield [starts[task] + row for row in batch]


def collate(model: MultitaskModel, padding: int, task: str, features: Sequence[Feature]) -> dict[str, Any]:
    """The keyword arguments of the model's forward for features of one task, on the CPU. padding: the padding piece's id."""
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
    """By task, the examples tokenised. Raises InputError where the tasks are not the model's, or a row does not fit."""
    if set(examples) != set(model.tasks):
        raise InputError(f"examples: expected those of the tasks {', '.join(model.tasks)}, got {', '.join(examples)}")
    found = {}
    for name, task in model.tasks.items():
        try:
            found[name] = task.features(tokenizer, examples[name], max_length)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return found


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
    """Trains and prunes in place; returns what the Trainer logged.

    features: by task, of `features_of`. arguments: of Hugging Face's Trainer, which trains: checkpoints, mixed precision,
    gradient accumulation, several devices and logging are its. max_steps must be set; the learning rate there is that of the
    weights where `learning_rates` ("weights", "scores", "sigma") does not say another.
    resume: go on from the last checkpoint in arguments.output_dir, where there is one; the final masks are those of the run
    that was not interrupted. progress: called with the steps done and their number.
    Raises InputError: max_steps that is not set, an unknown group of learning rates.
    """
    require_accelerate()
    if arguments.max_steps < 1:
        raise InputError(f"max_steps: expected at least 1, got {arguments.max_steps}")
    rates = {**LEARNING_RATES, "weights": arguments.learning_rate, **(learning_rates or {})}
    if set(rates) != set(LEARNING_RATES):
        raise InputError(f"learning_rates: expected some of {', '.join(LEARNING_RATES)}, got {', '.join(learning_rates or {})}")
    trainer = _Trainer(pruning, features, arguments, tokenizer, rates, progress)
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(arguments.output_dir))) if resume else None)
    return list(trainer.state.log_history)


def evaluate_task(
    model: MultitaskModel,
    task: str,
    examples: Sequence[Example],
    features: Sequence[Feature],
    tokenizer: Any,
    *,
    max_tokens: int = 8192,
) -> Evaluation:
    """The task's metric with its 95% interval; the model is evaluated as it is, and left in the mode that it was in."""
    device, training = model_device(model), {module: module.training for module in model.modules()}
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
                found = model(**on_device).logits.cpu()
            for row, of_row in zip(rows, found, strict=True):
                logits[row] = of_row[: len(features[row]["input_ids"])] if model.tasks[task].by_token else of_row
    finally:
        for module, mode in training.items():
            module.training = mode
    return model.tasks[task].score(examples, features, logits)


class _Trainer(QuietTrainer):
    """The Trainer with the batches, the parameter groups and the callbacks of a multitask pruning."""

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
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = self.model.parameter_groups(self.learning_rates, self.args.weight_decay)
        made: torch.optim.Optimizer = cls(groups, **options)
        self.optimizer = made
        return made

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        super().log({**logs, "density": self.model_of_run.reached}, *arguments, **options)

    def _collate(self, rows: Sequence[tuple[str, Feature]]) -> dict[str, Any]:
        return collate(self.model_of_run, self.padding, rows[0][0], [feature for _, feature in rows])

    @property
    def model_of_run(self) -> MultitaskPruning:
        """The model, whatever it is wrapped in."""
        found: MultitaskPruning = self.accelerator.unwrap_model(self.model)
        return found


class _Rows(ConcatDataset[tuple[str, Feature]]):
    """All tasks' features in a row, each with the name of its task."""

    def __init__(self, features: Mapping[str, Sequence[Feature]]) -> None:
        super().__init__([[(name, feature) for feature in rows] for name, rows in features.items()])  # type: ignore[misc]


class _Schedule(TrainerCallback):  # type: ignore[misc]
    """Chooses the masks before the first step and after each, so that they are those of the weights as they are."""

    def __init__(self, pruning: MultitaskPruning) -> None:
        self.pruning = pruning

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruning.update_masks_(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruning.update_masks_(state.global_step, state.max_steps)
