"""Training of a tagger with Hugging Face's Trainer, also with a penalty on the language models' gates (projected SGD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

from secateur.data.conll import Sentence
from secateur.learned.ldnet.tagger import Tagger, collate
from secateur.learned.ldnet.tagging import evaluate
from secateur.learned.shared.gate_regularisers import REGULARISERS, Regulariser, regulariser
from secateur.support.errors import InputError
from secateur.support.progress import Progress
from secateur.support.trainer import QuietTrainer


@dataclass(frozen=True)
class GatePenalty:
    """The penalty lambda0 R(z) on the language models' gates z, which is added to the loss.

    Args:
        lambda0: The penalty's weight. The paper uses 0.05 for named entities and 0.5 for chunking.
        wanted: The number of layers of both directions together that may stay, for R3. It is the paper's lambda1.
        regulariser: "R1", "R2" or "R3".
        learning_rate: The gates' learning rate. Gates have no momentum, so no gate shrinks further once the wanted number is
            reached.
        reopen: Whether a closed gate may open again. It opens if the loss pulls more than the penalty, as in the paper's
            projected SGD. The noise of small batches can open a gate too. With False closed gates stay closed, and their number
            settles sooner.

    Raises:
        InputError: A number is negative, or the regulariser is unknown.

    References:
        Liu et al. 2018, arXiv 1804.07827, section 3.2.
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
        """Compute lambda0 R(z), a scalar, for gates z [layers]."""
        return self.lambda0 * regulariser(self.regulariser, z, self.wanted)


@torch.no_grad()
def project_(tagger: Tagger) -> None:
    """Clamp every gate to [0, 1], in place."""
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
    """Train a tagger in place by SGD with momentum.

    In epoch k the learning rate is arguments.learning_rate / (1 + decay k), as in the paper's code. The language models'
    weights are never trained; their gates are trained only with a penalty.

    Args:
        tagger: The tagger.
        sentences: The training sentences.
        dev: The sentences to evaluate on.
        arguments: Hugging Face's TrainingArguments.
        penalty: The penalty on the gates. With it the gates are trained in a parameter group of their own and projected after
            each step. Without it they do not change.
        momentum: The momentum of the weights.
        decay: The decay of the learning rate by epoch.
        resume: Continue from the last checkpoint in arguments.output_dir, if there is one.
        progress: True for a progress bar, or a function of (steps done, all steps).

    Returns:
        The Trainer's log: loss, penalty, gates, number of layers left, and on `dev` eval_f1, or eval_accuracy for plain tags.

    Raises:
        InputError: A tag is not one of the tagger's.

    References:
        Liu et al. 2018, arXiv 1804.07827 (projected SGD on the gates).
    """
    rows = [_featurised(tagger, sentence) for sentence in sentences]
    for gates in tagger.gates:
        gates.requires_grad_(penalty is not None)
    trainer = _Trainer(tagger, rows, dev, arguments, penalty, momentum, decay, progress)
    log = trainer.run(resume=resume)
    for gates in tagger.gates:
        gates.requires_grad_(False)
    return log


def _featurised(tagger: Tagger, sentence: Sentence) -> dict[str, Any]:
    """Turn a sentence into numbers; an error names its line in the file."""
    try:
        return tagger.featurise(sentence.tokens, sentence.tags)
    except InputError as error:
        raise InputError(f"data: sentence at line {sentence.line}: {error}") from error


class _Trainer(QuietTrainer):
    """A Trainer with the gates' penalty, parameter group and projection, which evaluates the tagger's metric."""

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
        """The tagger, without the wrappers that Accelerate puts around the model."""
        tagger: Tagger = self.accelerator.unwrap_model(self.model)
        return tagger

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build SGD with the group of the weights and, with a penalty, the group of the gates."""
        gates = self.tagger.gates if self.penalty is not None else []
        gate_ids = {id(parameter) for parameter in gates}
        weights = [
            parameter for parameter in self.tagger.parameters() if parameter.requires_grad and id(parameter) not in gate_ids
        ]
        groups: list[dict[str, Any]] = [{"params": weights, "momentum": self.momentum, "name": "weights"}]
        if self.penalty is not None:
            groups.append({"params": gates, "momentum": 0.0, "lr": self.penalty.learning_rate, "name": "gates"})
        self.optimizer = torch.optim.SGD(groups, lr=self.args.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Let the weights' learning rate fall with each epoch, and keep the gates' rate constant."""
        epoch_steps = max(1, round(num_training_steps / self.args.num_train_epochs))
        # The factors of the groups "weights" and "gates".
        factors = [lambda step: 1 / (1 + self.decay * (step // epoch_steps)), lambda step: 1.0]
        scheduled = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(scheduled, factors[: len(scheduled.param_groups)])
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the tagger's loss plus the penalty."""
        outputs = model(**inputs)
        loss = outputs["loss"]
        if self.penalty is not None:
            loss = loss + self.penalty.of(self.tagger.all_gates)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate the tagger on `dev`; log and return its metric."""
        evaluation = evaluate(self.tagger, self.dev, batch_size=self.args.eval_batch_size)
        metrics = {"eval_f1" if evaluation.metric == "F1" else "eval_accuracy": evaluation.value}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add the number of open layers and, with a penalty, the penalty and the gates."""
        gate_logs: dict[str, Any] = {"layers": self.tagger.layers_left}
        if self.penalty is not None:
            with torch.no_grad():
                z = self.tagger.all_gates
                gate_logs |= {"penalty": float(self.penalty.of(z)), "gates": [round(gate, 4) for gate in z.tolist()]}
        super().log({**logs, **gate_logs}, *arguments, **options)


class _Projection(TrainerCallback):  # type: ignore[misc]
    """Project the gates after each step, before a checkpoint is written. Without `reopen`, closed gates get no gradient."""

    def __init__(self, tagger: Tagger, reopen: bool) -> None:
        self.tagger, self.reopen = tagger, reopen

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zero the gradients of closed gates unless they may reopen."""
        if not self.reopen:
            for gates in self.tagger.gates:
                if gates.grad is not None:
                    gates.grad.masked_fill_(gates == 0, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clamp the gates to [0, 1]."""
        project_(self.tagger)
