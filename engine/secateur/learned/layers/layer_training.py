"""Training of layer gates by Hugging Face's Trainer: projected SGD for the gates, AdamW for the weights, in two stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from secateur.data.examples import Example
from secateur.learned.layers.layer_gates import LayerGates
from secateur.learned.shared.trainer import Progress, QuietTrainer, last_checkpoint
from secateur.support.errors import InputError
from secateur.tasks import Item, Task

Collator = Callable[[Sequence[Any]], dict[str, Tensor]]
LEARNING_RATES = {"gates": 1e-2, "weights": 3e-5}
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def task_features(task: Task, gates: LayerGates, examples: Sequence[Example]) -> tuple[list[Item], Collator]:
    """Return a task's examples as features, and the function that makes batches of them with labels for the model's own loss.

    Raises:
        InputError: An example does not fit the task.
    """
    return task.items(gates.model, examples), task.training_batch


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
    """Trains the gates, and the model unless it is frozen, in place; returns what the Trainer logged, with every gate.

    features: a data set, or a list, whose rows `collate` makes into keyword arguments of the model's forward, with labels:
    those of `task_features`, or any. arguments: of Hugging Face's Trainer, which trains: checkpoints, mixed precision,
    gradient accumulation and logging are its. The gates go by plain SGD, the weights by AdamW, at the learning rates "gates"
    and "weights" (the arguments' by default), which the schedule of the arguments changes alike; gradients of the gates are not
    clipped. resume: go on from the last checkpoint in arguments.output_dir, where there is one; the gates at the end are
    those of the run that was not interrupted. progress: called with the steps done and their number.
    Raises InputError: max_steps that is not set, another optimizer than AdamW, an unknown group of learning rates, detached
    gates.
    """
    _require(gates, arguments)
    rates = {**LEARNING_RATES, "weights": arguments.learning_rate, **(learning_rates or {})}
    if set(rates) != set(LEARNING_RATES):
        raise InputError(f"learning_rates: expected some of {', '.join(LEARNING_RATES)}, got {', '.join(learning_rates or {})}")
    # The Trainer would drop columns that the gates' forward, which takes any, does not name.
    own = copy.copy(arguments)
    own.remove_unused_columns = False
    trainer = _Trainer(gates, own, progress, rates, train_dataset=features, data_collator=collate)
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(arguments.output_dir))) if resume else None)
    return list(trainer.state.log_history)


class GatedAdamW(torch.optim.AdamW):
    """AdamW, but for the groups that are named "gates": those go by plain gradient descent."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if group["name"] == "gates":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.add_(parameter.grad, alpha=-group["lr"])
                        parameter.grad = None  # So that AdamW passes it by.
        return super().step(closure)


class _Trainer(QuietTrainer):
    """The Trainer with the gates' optimizer, projection and stages."""

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
        args = self.args
        groups = self.gates.parameter_groups(self.learning_rates, args.weight_decay)
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer: torch.optim.Optimizer = GatedAdamW(groups, betas=betas, eps=args.adam_epsilon)
        return self.optimizer

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        gates = {f"z/{name}": value for name, value in self.gates.values.items()}
        super().log({**logs, "layers_left": len(self.gates.left), **gates}, *arguments, **options)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Of the weights alone: clipped together with them, the gates would be shrunk the less the more the weights learn."""
        return self.accelerator.clip_grad_norm_(self.gates.model.parameters(), self.args.max_grad_norm)

    @property
    def gates(self) -> LayerGates:
        """The model, whatever it is wrapped in."""
        found: LayerGates = self.accelerator.unwrap_model(self.model)
        return found


class _Stages(TrainerCallback):  # type: ignore[misc]
    """Projects the gates after each step of the optimizer, and sets lambda_0 for the next."""

    def __init__(self, gates: LayerGates) -> None:
        self.gates = gates

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at_step(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at_step(state)

    def _at_step(self, state: Any) -> None:
        self.gates.project_()
        self.gates.at_step_(state.global_step, state.max_steps)


def _require(gates: LayerGates, arguments: TrainingArguments) -> None:
    if not gates.attached:
        raise InputError("gates: expected gates on their model, got detached ones")
    if arguments.max_steps < 1:
        raise InputError(f"max_steps: expected at least 1, got {arguments.max_steps}")
    if str(getattr(arguments.optim, "value", arguments.optim)) not in _ADAMW:
        raise InputError(f"optim: expected {' or '.join(_ADAMW)}, got {arguments.optim!r}")
