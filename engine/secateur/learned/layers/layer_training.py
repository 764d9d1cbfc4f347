"""Training of layer gates with Hugging Face's Trainer: projected SGD for the gates, AdamW for the weights, in two stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from secateur.data.examples import Example
from secateur.learned.layers.layer_gates import LayerGates
from secateur.support.errors import InputError
from secateur.support.progress import Progress
from secateur.support.trainer import QuietTrainer, learning_rates_of
from secateur.tasks import Item, Task

Collator = Callable[[Sequence[Any]], dict[str, Tensor]]
LEARNING_RATES = {"gates": 1e-2, "weights": 3e-5}
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def task_features(task: Task, gates: LayerGates, examples: Sequence[Example]) -> tuple[list[Item], Collator]:
    """Turn a task's examples into features, and give their collator.

    Args:
        task: The task.
        gates: The gates on the model that will be trained.
        examples: The task's examples.

    Returns:
        The features, one for each example, and a collator. The collator turns features into a batch on the CPU: keyword
        arguments of the model's forward pass, int64 [B, T], with "labels" for the model's own loss.

    Raises:
        InputError: An example does not fit the task.
    """
    task.require_fit(gates.model)
    items = task.items(gates.model, examples)
    return items, lambda batch: task.model_inputs(gates.model, task.training_batch(batch))


def train(
    gates: LayerGates,
    features: Any,
    arguments: TrainingArguments,
    *,
    collate: Collator,
    learning_rates: Mapping[str, float] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train the gates in place, and the model's weights too unless they are frozen.

    The gates are trained by plain SGD, the weights by AdamW. The learning-rate schedule of `arguments` changes both rates. The
    gates' gradients are not clipped.

    Args:
        gates: The gates, attached to their model.
        features: A data set or a list, for example from `task_features`.
        arguments: Hugging Face's TrainingArguments, with max_steps set. The Trainer handles checkpoints, mixed precision,
            gradient accumulation and logging.
        collate: A function that turns rows of `features` into keyword arguments of the model's forward pass, with labels.
        learning_rates: The learning rates of "gates" (default 1e-2) and "weights" (default arguments.learning_rate).
        resume: Continue from the last checkpoint in arguments.output_dir, if there is one. The final gates are the same as
            those of an uninterrupted run.
        progress: True for a progress bar, or a function of (steps done, all steps).

    Returns:
        The Trainer's log. Each entry also holds "layers_left" and every gate as "z/NAME".

    Raises:
        InputError: max_steps is not set, the optimizer is not AdamW, a group of learning rates is unknown, or the gates are
            detached.

    References:
        Liu et al. 2018, arXiv 1804.07827 (projected SGD in two stages).
    """
    _require(gates, arguments)
    rates = learning_rates_of({**LEARNING_RATES, "weights": arguments.learning_rate}, learning_rates)
    # The gates' forward takes any keyword, so the Trainer would drop all columns that it does not name.
    trainer_arguments = copy.copy(arguments)
    trainer_arguments.remove_unused_columns = False
    trainer = _Trainer(gates, trainer_arguments, progress, rates, train_dataset=features, data_collator=collate)
    return trainer.run(resume=resume)


class GatedAdamW(torch.optim.AdamW):
    """AdamW for all groups but those named "gates", which are updated by plain gradient descent."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the gates by gradient descent and all other parameters by AdamW."""
        for group in self.param_groups:
            if group["name"] == "gates":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.add_(parameter.grad, alpha=-group["lr"])
                        parameter.grad = None  # AdamW skips parameters without a gradient.
        return super().step(closure)


class _Trainer(QuietTrainer):
    """A Trainer with the gates' optimizer, projection and two stages."""

    def __init__(
        self,
        gates: LayerGates,
        arguments: TrainingArguments,
        progress: Progress | None,
        learning_rates: Mapping[str, float],
        **options: Any,
    ) -> None:
        self.learning_rates = learning_rates
        super().__init__(gates, arguments, progress, callbacks=[_Stages(gates)], **options)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build `GatedAdamW` with the groups of the gates and of the weights."""
        args = self.args
        groups = self.gates.parameter_groups(self.learning_rates, args.weight_decay)
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer: torch.optim.Optimizer = GatedAdamW(groups, betas=betas, eps=args.adam_epsilon)
        return self.optimizer

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add the number of open layers and all gates."""
        gates = {f"z/{name}": value for name, value in self.gates.values.items()}
        super().log({**logs, "layers_left": len(self.gates.left), **gates}, *arguments, **options)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip only the weights' gradients: with a shared norm, large weight gradients slow down the shrinking of gates."""
        return self.accelerator.clip_grad_norm_(self.gates.model.parameters(), self.args.max_grad_norm)

    @property
    def gates(self) -> LayerGates:
        """The gates, without the wrappers that Accelerate puts around the model."""
        gates: LayerGates = self.accelerator.unwrap_model(self.model)
        return gates


class _Stages(TrainerCallback):  # type: ignore[misc]
    """Project the gates after each optimizer step, and set lambda_0 for the next step."""

    def __init__(self, gates: LayerGates) -> None:
        self.gates = gates

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at_step(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at_step(state)

    def _at_step(self, state: Any) -> None:
        """Project the gates and set lambda_0."""
        self.gates.project_()
        self.gates.at_step_(state.global_step, state.max_steps)


def _require(gates: LayerGates, arguments: TrainingArguments) -> None:
    """Raise InputError if the gates or the arguments cannot be trained with."""
    if not gates.attached:
        raise InputError("gates: expected gates on their model, got detached ones")
    if arguments.max_steps < 1:
        raise InputError(f"max_steps: expected at least 1, got {arguments.max_steps}")
    if str(getattr(arguments.optim, "value", arguments.optim)) not in _ADAMW:
        raise InputError(f"optim: expected {' or '.join(_ADAMW)}, got {arguments.optim!r}")
