"""One encoder with a head for each of its tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from secateur.learned.multitask.encoder_tasks import Classification, EncoderTask
from secateur.model.families import branches
from secateur.support.errors import InputError

Pooling = Literal["mean", "first"]


@dataclass
class HeadOutput:
    """The output of a head.

    Attributes:
        loss: A scalar, or None without labels.
        logits: Floating point [B, outputs], or [B, T, outputs] for a task by token.
    """

    loss: Tensor | None
    logits: Tensor

    def __getitem__(self, name: str | int) -> Any:
        """Return a field by its name or its position, as the outputs of transformers allow."""
        return (self.loss, self.logits)[name] if isinstance(name, int) else getattr(self, name)


class Head(nn.Module):
    """A task's head: dropout and a linear layer, applied to each token or to pooled states.

    Args:
        hidden: The width of the encoder's states.
        task: The task.
        pooling: "mean" for the mean over all tokens but padding, "first" for the first token.
        dropout: The dropout probability.
        like: A tensor whose device and dtype the weights get.
    """

    def __init__(self, hidden: int, task: EncoderTask, pooling: Pooling, dropout: float, like: Tensor) -> None:
        super().__init__()
        self.by_token, self.pooling = task.by_token, pooling
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden, task.outputs, device=like.device, dtype=like.dtype)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            states: The encoder's last hidden states, floating point [B, T, hidden].
            attention_mask: Padding mask [B, T], 1 at tokens.

        Returns:
            Logits [B, outputs], or [B, T, outputs] for a task by token.
        """
        if self.by_token:
            logits: Tensor = self.linear(self.dropout(states))
            # A span must not start or end at padding.
            return logits.masked_fill(~attention_mask.bool().unsqueeze(-1), torch.finfo(logits.dtype).min)
        if self.pooling == "mean":
            weights = attention_mask.to(states.dtype).unsqueeze(-1)  # [B, T, 1]
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1)  # [B, hidden]
        else:
            pooled = states[:, 0]
        logits = self.linear(self.dropout(pooled))
        return logits


class MultitaskModel(nn.Module):
    """One encoder with a head for each task.

    Args:
        encoder: An encoder of a known family, whose output has last_hidden_state. It is not copied.
        tasks: The tasks by name.
        pooling: What a head reads: "mean" for the mean over all tokens but padding, "first" for the first token.
        dropout: The heads' dropout probability.
        seed: The seed of the heads' initial weights.

    Raises:
        InputError: There are no tasks; a task's name is empty, has a point or is an attribute of torch.nn.ModuleDict (train,
            type); the pooling is unknown; or the model is not an encoder of a known family.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tasks: Mapping[str, EncoderTask],
        *,
        pooling: Pooling = "mean",
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not tasks:
            raise InputError("tasks: expected at least one, got none")
        if pooling not in ("mean", "first"):
            raise InputError(f"pooling: expected mean or first, got {pooling!r}")
        for name in tasks:
            if not name or "." in name:
                raise InputError(f"tasks: expected names without points, got {name!r}")
            if hasattr(nn.ModuleDict(), name):
                raise InputError(f"tasks: expected names that torch.nn.ModuleDict leaves free, got {name!r}")
        if any(branch.stack != "encoder" for branch in branches(encoder).values()):
            raise InputError(f"model: expected an encoder, got {type(encoder).__name__}")
        self.encoder = encoder
        self.config = config = cast(Any, encoder.config)
        self.tasks = dict(tasks)
        self.pooling: Pooling = pooling
        like = next(encoder.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = {name: Head(config.hidden_size, task, pooling, dropout, like) for name, task in tasks.items()}
        self.heads = nn.ModuleDict(heads)

    def forward(
        self,
        task: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """Run the encoder and the head of one task.

        Args:
            task: The task's name.
            input_ids: Piece ids, int64 [B, T].
            attention_mask: Padding mask, int64 [B, T], 1 at tokens.
            token_type_ids: The number of the text that a piece belongs to, int64 [B, T], for encoders that read it.
            labels: The labels as `EncoderTask.labels` builds them, or None.

        Returns:
            The logits and, with labels, the loss.
        """
        logits = self.heads[task](_states(self.encoder, input_ids, attention_mask, token_type_ids), attention_mask)
        return HeadOutput(None if labels is None else self.tasks[task].loss(logits, labels), logits)

    def classifier(self, task: str) -> nn.Module:
        """Build a classifier from the encoder and the head of one classification task.

        The classifier works with `secateur.SequenceClassification`, and so with `secateur.attribute`, `evaluate` and
        `benchmark`.

        Args:
            task: The task's name.

        Returns:
            A model that shares this model's weights.

        Raises:
            InputError: The task is not one of this model's classification tasks.
        """
        classification = self.tasks.get(task)
        if not isinstance(classification, Classification):
            known = [name for name, other in self.tasks.items() if isinstance(other, Classification)]
            raise InputError(f"task: expected a classification task, of {', '.join(known)}, got {task!r}")
        return _Classifier(self, task, classification)


class _Classifier(nn.Module):
    """An encoder and one head, with the labels in its config."""

    def __init__(self, model: MultitaskModel, task: str, classification: Classification) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.heads[task]
        self.config = config = copy.deepcopy(cast(Any, model.config))
        config.id2label = dict(enumerate(classification.names))
        config.label2id = {name: number for number, name in enumerate(classification.names)}
        self.train(model.training)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> HeadOutput:
        """Compute the logits [B, labels] of the task."""
        states = _states(self.encoder, input_ids, attention_mask, token_type_ids)
        return HeadOutput(None, self.head(states, attention_mask))


def _states(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """Compute the encoder's last hidden states [B, T, hidden]."""
    type_ids = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
    states: Tensor = encoder(input_ids=input_ids, attention_mask=attention_mask, **type_ids).last_hidden_state
    return states


def encoder_of(model: nn.Module) -> nn.Module:
    """Return the encoder of a model, without its heads and its decoder.

    Args:
        model: A model of a known family, which may be an encoder itself.

    Returns:
        The encoder, which shares the model's weights.

    Raises:
        InputError: The model has no encoder, or its family is unknown.
    """
    stacks = {branch.stack for branch in branches(model).values()}
    if "encoder" not in stacks:
        raise InputError(f"model: expected one with an encoder, got {type(model).__name__}")
    if "decoder" in stacks:
        from transformers import T5EncoderModel

        encoder: nn.Module = T5EncoderModel(copy.deepcopy(model.config))
        encoder.shared, encoder.encoder = model.get_submodule("shared"), model.get_submodule("encoder")
        encoder.training = model.training  # Not encoder.train(...), which would change the modes of the model's own modules.
        return encoder
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    if not isinstance(base, nn.Module):
        raise InputError(f"model: expected one with an encoder, got {type(model).__name__}")
    return base
