"""What every task does: examples to items, items to length-bucketed batches, the target function, evaluation."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from secateur.data.examples import Example, require_text
from secateur.model.faster_forward import faster_forward
from secateur.support.errors import InputError
from secateur.tasks.batches import IGNORED, Batch, Item, buckets, in_order, model_device, pad
from secateur.tasks.metrics import Evaluation

Target = Literal["probability", "log_probability", "margin"]
logger = logging.getLogger("secateur")


class Task(ABC):
    """A way to use a model. Subclasses say which columns their examples have and how they are scored."""

    columns: ClassVar[tuple[str, ...]] = ("input", "target")
    auto_class: ClassVar[str]
    labels: list[str] | None

    def __init__(self, tokenizer: Any, *, labels: Sequence[str] | None = None, max_length: int | None = None) -> None:
        if labels is not None and len(set(labels)) < 2:
            raise InputError(f"labels: expected at least two different labels, got {list(labels)!r}")
        self.tokenizer = tokenizer
        self.labels = None if labels is None else list(labels)
        limit = getattr(tokenizer, "model_max_length", None)
        self.max_length = max_length or (limit if limit is not None and limit < 100_000 else None)

    @abstractmethod
    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        """The examples tokenised; with all_labels one item for each example and candidate label, targets unused."""

    @abstractmethod
    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        """Pads the items into one batch."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, T, classes], aligned with `batch.labels`, by an ordinary forward pass."""

    @abstractmethod
    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        """The task's metric of a model in eval mode; max_tokens as in `batches`."""

    def ranked(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Tensor:
        """How likely each candidate label is for each example's input [examples, labels]: logarithms, each example's up to a
        constant. Raises InputError where inputs have no one label, or the task has no labels."""
        with self.scoring(model):
            batches = list(self._input_batches(examples, model_device(model), max_tokens))
            return in_order(
                [self.label_scores(model, batch) for batch in batches], [r for batch in batches for r in batch.rows]
            )

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[None]:
        """Within it, `label_scores` may be called, also from several threads; some of the model's modules are others that
        compute the same. Raises InputError as `ranked`."""
        self.label_names(model)
        with faster_forward(model):
            yield

    def label_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """`ranked` for a batch of inputs, in its order. Tasks that have a label for each input define it."""
        raise NotImplementedError

    def label_names(self, model: nn.Module) -> list[str]:
        """The candidate labels in the order of `ranked`. Raises InputError as `ranked`."""
        return self._closed_labels()

    def encode(self, inputs: list[str]) -> list[list[int]]:
        """The ids of inputs, however long."""
        return self._tokenize(inputs)

    @property
    def room(self) -> int | None:
        """How many ids of an input the model takes; None: any number."""
        return self.max_length

    def cut(self, ids: list[int]) -> list[int]:
        """At most `room` of an input's ids, the last among them: the end-of-sequence mark of most tokenizers."""
        return ids if self.room is None or len(ids) <= self.room else [*ids[: self.room - 1], ids[-1]]

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Pads items that have no target into one batch of at least that length, for `label_scores`."""
        return Batch(self._inputs(items, device, length), torch.empty(len(items), 0), [item.row for item in items])

    def probabilities(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> list[dict[str, float]]:
        """For each example's input the candidate labels, with how likely each is among them. Raises InputError as `ranked`."""
        scores = self.ranked(model, examples, max_tokens).double().softmax(1).tolist()
        names = self.label_names(model)
        return [dict(zip(names, of_example, strict=True)) for of_example in scores]

    def generate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int, longest: int) -> list[str]:
        """The greedy output for each example's input, of at most `longest` pieces. Raises InputError where there is none."""
        raise InputError(f"task: expected one that generates text, got {type(self).__name__}")

    def target(self, model: nn.Module, batch: Batch, kind: Target) -> Tensor:
        """F [B] of the batch's own labels, as in `target_of`."""
        return target_of(self.logits(model, batch), batch.labels, kind)

    def batches(self, items: Sequence[Item], device: torch.device, max_tokens: int) -> Iterator[Batch]:
        """Batches of like length, longest first; a batch's padded input holds at most max_tokens tokens (one item at least)."""
        for bucket in buckets(items, max_tokens):
            yield self.collate(bucket, device)

    def _inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> dict[str, Tensor]:
        """The items' padded input ids and their mask. Without a padding piece the end mark pads: the mask hides it."""
        padding = self.tokenizer.pad_token_id
        sequences = [item.input_ids for item in items]
        ids = pad(sequences, self.tokenizer.eos_token_id if padding is None else padding, device, length)
        return {"input_ids": ids, "attention_mask": pad([[1] * len(sequence) for sequence in sequences], 0, device, length)}

    def _closed_labels(self) -> list[str]:
        if self.labels is None:
            raise InputError("labels: expected the candidate labels of a closed task, got None (open targets)")
        return self.labels

    def _tokenize(self, texts: list[str], **options: Any) -> list[list[int]]:
        encoded: list[list[int]] = self.tokenizer(texts, truncation=False, verbose=False, **options)["input_ids"]
        return encoded

    def _encode_cut(self, examples: Sequence[Example]) -> list[list[int]]:
        """The examples' inputs, encoded and cut to what the model takes."""
        encoded = self.encode(texts(examples, "input"))
        too_long = 0 if self.room is None else sum(len(ids) > self.room for ids in encoded)
        if too_long:
            logger.warning("%d of %d inputs are longer than %d pieces and were cut", too_long, len(encoded), self.room)
        return [self.cut(ids) for ids in encoded]

    def _input_batches(self, examples: Sequence[Example], device: torch.device, max_tokens: int) -> Iterator[Batch]:
        """Batches of the inputs alone."""
        items = [Item(row, ids, []) for row, ids in enumerate(self._encode_cut(examples))]
        for bucket in buckets(items, max_tokens):
            yield self.collate_inputs(bucket, device)

    def _targets(self, examples: Sequence[Example]) -> list[str]:
        """The targets, which must be text, and among the labels of a closed task."""
        targets = texts(examples, "target")
        for number, target in enumerate(targets, start=1):
            if self.labels is not None and target not in self.labels:
                expected = ", ".join(map(repr, self.labels[:12])) + (" ..." if len(self.labels) > 12 else "")
                raise InputError(f"examples, row {number}: expected a target among the labels {expected}, got {target!r}")
        return targets


def target_of(logits: Tensor, labels: Tensor, kind: Target) -> Tensor:
    """F [B]: for each example the sum over its target positions of P(y_j | x, y_<j), of its logarithm, or of the distance of
    y_j's logit to the next best. logits [B, T, classes]; labels [B, T], the y_j, -100 where none."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    index = labels.clamp(min=0).unsqueeze(-1)
    gold = logits.gather(-1, index).squeeze(-1)
    if kind == "margin":
        value = gold - logits.scatter(-1, index, -math.inf).amax(-1)
    else:
        value = gold - logits.logsumexp(-1)
        value = value.exp() if kind == "probability" else value
    return (value * (labels != IGNORED)).sum(1)


def texts(examples: Sequence[Example], column: str) -> list[str]:
    """One text column of all examples."""
    return [require_text(example, column, number) for number, example in enumerate(examples, start=1)]


def without_targets(task: Task, rows: Sequence[Example]) -> bool:
    """Whether examples are inputs alone."""
    return task.columns[-1] not in rows[0]
