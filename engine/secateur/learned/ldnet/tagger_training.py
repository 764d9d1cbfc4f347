"""Training of a tagger by Hugging Face's Trainer: whole, then with a penalty on the language models' gates (projected SGD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

from secateur.data.conll import Sentence
from secateur.learned.ldnet.tagger import Tagger, collate
from secateur.learned.ldnet.tagging import evaluate
from secateur.learned.shared.gate_regularisers import REGULARISERS, Regulariser, regulariser
from secateur.learned.shared.trainer import Progress, QuietTrainer, last_checkpoint
from secateur.support.errors import InputError


@dataclass(frozen=True)
class GatePenalty:
    """What is added to the loss for the language models' gates: lambda0 R(z). The paper has 0.05 for entities and 0.5 for
    chunks.

    wanted: how many layers of both directions together may stay, for R3 (the paper's lambda1). learning_rate: of the gates;
    they descend without momentum, so that none shrinks on after the wanted number is reached.
    reopen: a closed gate opens again where the loss pulls more than the penalty, which is projected SGD as the paper has it.
    The noise of small batches does that too; without it closed gates stay closed, and their number settles sooner.
    Raises InputError: a negative number, an unknown regulariser.
    """

    lambda0: float
    wanted: int
    regulariser: Regulariser = "R3"
    learning_rate: float = 0.15
    reopen: bool = True

    def __post_init__(self) -> None:
        for name in ("lambda0", "wanted", "learning_rate"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.regulariser not in REGULARISERS:
            raise InputError(f"regulariser: expected {', '.join(REGULARISERS)}, got {self.regulariser!r}")

    def of(self, z: Tensor) -> Tensor:
        """lambda0 R(z), a scalar."""
        return self.lambda0 * regulariser(self.regulariser, z, self.wanted)


@torch.no_grad()
def project_(tagger: Tagger) -> None:
    """Brings every gate back into [0, 1]."""
    for gates in tagger.gates:
        gates.clamp_(0, 1)


def train(
    tagger: Tagger,
    sentences: Sequence[Sentence],
    dev: Sequence[Sentence],
    arguments: TrainingArguments,
    *,
    penalty: GatePenalty | None = None,
    momentum: float = 0.9,
    decay: float = 0.05,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Trains in place; returns what the Trainer logged: loss, penalty, gates, layers left, and on `dev` eval_f1, of plain
    tags eval_accuracy.

    SGD with momentum; in epoch k the learning rate is that of the arguments / (1 + decay k), as in the paper's code. penalty:
    with it the gates are trained too, in a group of their own, and projected after each step; without it they stay as they are.
    All other weights of the language models stay as they are in any case. arguments: of Hugging Face's Trainer.
    resume: go on from the last checkpoint in its output_dir, where there is one.
    Raises InputError: a tag that the tagger does not have.
    """
    rows = [_featurised(tagger, sentence) for sentence in sentences]
    for gates in tagger.gates:
        gates.requires_grad_(penalty is not None)
    trainer = _Trainer(tagger, rows, dev, arguments, penalty, momentum, decay, progress)
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(arguments.output_dir))) if resume else None)
    for gates in tagger.gates:
        gates.requires_grad_(False)
    return list(trainer.state.log_history)


def _featurised(tagger: Tagger, sentence: Sentence) -> dict[str, Any]:
    try:
        return tagger.featurise(sentence.tokens, sentence.tags)
    except InputError as error:
        raise InputError(f"data: sentence of line {sentence.line}: {error}") from error


class _Trainer(QuietTrainer):
    """The Trainer with the penalty, the group of the gates and their projection, and F1 as the evaluation."""

    def __init__(
        self,
        tagger: Tagger,
        rows: list[dict[str, Any]],
        dev: Sequence[Sentence],
        arguments: TrainingArguments,
        penalty: GatePenalty | None,
        momentum: float,
        decay: float,
        progress: Progress | None,
    ) -> None:
        self.penalty, self.momentum, self.decay, self.dev = penalty, momentum, decay, list(dev)
        projection = _Projection(tagger, reopen=penalty is not None and penalty.reopen)
        data = {"train_dataset": rows, "eval_dataset": self.dev, "data_collator": collate}
        super().__init__(tagger, arguments, progress, callbacks=[projection], **data)

    @property
    def tagger(self) -> Tagger:
        """The model, whatever it is wrapped in."""
        found: Tagger = self.accelerator.unwrap_model(self.model)
        return found

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        gates = self.tagger.gates if self.penalty is not None else []
        of_gates = {id(parameter) for parameter in gates}
        rest = [each for each in self.tagger.parameters() if each.requires_grad and id(each) not in of_gates]
        groups: list[dict[str, Any]] = [{"params": rest, "momentum": self.momentum, "name": "weights"}]
        if self.penalty is not None:
            groups.append({"params": gates, "momentum": 0.0, "lr": self.penalty.learning_rate, "name": "gates"})
        self.optimizer = torch.optim.SGD(groups, lr=self.args.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """By epochs, the gates' rate staying as it is."""
        epoch_steps = max(1, round(num_training_steps / self.args.num_train_epochs))
        falling = [lambda step: 1 / (1 + self.decay * (step // epoch_steps)), lambda step: 1.0]
        found = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(found, falling[: len(found.param_groups)])
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs["loss"]
        if self.penalty is not None:
            loss = loss + self.penalty.of(self.tagger.all_gates)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        found = evaluate(self.tagger, self.dev, batch_size=self.args.eval_batch_size)
        metrics = {"eval_f1" if found.metric == "F1" else "eval_accuracy": found.value}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        more: dict[str, Any] = {"layers": self.tagger.layers_left}
        if self.penalty is not None:
            with torch.no_grad():
                z = self.tagger.all_gates
                more |= {"penalty": float(self.penalty.of(z)), "gates": [round(gate, 4) for gate in z.tolist()]}
        super().log({**logs, **more}, *arguments, **options)


class _Projection(TrainerCallback):  # type: ignore[misc]
    """Projects the gates after each step, before a checkpoint is written; before it, stops those that are to stay closed."""

    def __init__(self, tagger: Tagger, reopen: bool) -> None:
        self.tagger, self.reopen = tagger, reopen

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.reopen:
            for gates in self.tagger.gates:
                if gates.grad is not None:
                    gates.grad.masked_fill_(gates == 0, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        project_(self.tagger)
