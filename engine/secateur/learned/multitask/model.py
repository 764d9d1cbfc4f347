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
    """loss: a scalar, where labels were given. logits [B, outputs], or [B, T, outputs] for a task by token."""

    loss: Tensor | None
    logits: Tensor

    def __getitem__(self, name: str | int) -> Any:
        return (self.loss, self.logits)[name] if isinstance(name, int) else getattr(self, name)


class Head(nn.Module):
    """Dropout and a linear layer, over all tokens or over their pool: the mean of those that are no padding, or the first."""

    def __init__(self, hidden: int, task: EncoderTask, pooling: Pooling, dropout: float, like: Tensor) -> None:
        super().__init__()
        self.by_token, self.pooling = task.by_token, pooling
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden, task.outputs, device=like.device, dtype=like.dtype)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """states [B, T, hidden], attention_mask [B, T]."""
        if self.by_token:
            logits: Tensor = self.linear(self.dropout(states))
            # A span starts and ends on a token that is there.
            return logits.masked_fill(~attention_mask.bool().unsqueeze(-1), torch.finfo(logits.dtype).min)
        if self.pooling == "mean":
            weights = attention_mask.to(states.dtype).unsqueeze(-1)
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        else:
            pooled = states[:, 0]
        logits = self.linear(self.dropout(pooled))
        return logits


class MultitaskModel(nn.Module):
    """encoder: an encoder of transformers whose output has last_hidden_state. tasks: by name. Heads are drawn with the seed.

    Raises InputError: no tasks, a name that is empty, has a point or is one of torch's own (train, type), a pooling that does
    not exist, a model that is no encoder of a known family.
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
            made = {name: Head(config.hidden_size, task, pooling, dropout, like) for name, task in tasks.items()}
        self.heads = nn.ModuleDict(made)

    def forward(
        self,
        task: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> HeadOutput:
        """A batch of one task; labels as the task has them."""
        kinds = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kinds).last_hidden_state
        logits = self.heads[task](states, attention_mask)
        return HeadOutput(None if labels is None else self.tasks[task].loss(logits, labels), logits)

    def classifier(self, task: str) -> nn.Module:
        """The encoder with the head of one classification task, sharing this model's weights: a model for
        `secateur.SequenceClassification`, and so for `secateur.attribute`, `evaluate` and `benchmark`.
        Raises InputError for another kind of task."""
        found = self.tasks.get(task)
        if not isinstance(found, Classification):
            known = [name for name, each in self.tasks.items() if isinstance(each, Classification)]
            raise InputError(f"task: expected one that classifies, of {', '.join(known)}, got {task!r}")
        return _Classifier(self, task, found)


class _Classifier(nn.Module):
    def __init__(self, model: MultitaskModel, task: str, about: Classification) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.heads[task]
        self.config = config = copy.deepcopy(cast(Any, model.config))
        config.id2label = dict(enumerate(about.names))
        config.label2id = {name: number for number, name in enumerate(about.names)}
        self.train(model.training)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> HeadOutput:
        kinds = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kinds).last_hidden_state
        return HeadOutput(None, self.head(states, attention_mask))


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of a model of a known family, which may be the model itself: sharing its weights, without heads and decoder.
    Raises InputError for a model without an encoder."""
    stacks = {branch.stack for branch in branches(model).values()}
    if "encoder" not in stacks:
        raise InputError(f"model: expected one with an encoder, got {type(model).__name__}")
    if "decoder" in stacks:
        from transformers import T5EncoderModel

        made: nn.Module = T5EncoderModel(copy.deepcopy(model.config))
        made.shared, made.encoder = model.get_submodule("shared"), model.get_submodule("encoder")
        made.training = model.training  # Its parts, which are the model's, keep the mode that they are in.
        return made
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    if not isinstance(base, nn.Module):
        raise InputError(f"model: expected one with an encoder, got {type(model).__name__}")
    return base
