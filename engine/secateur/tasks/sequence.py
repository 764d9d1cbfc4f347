"""Sequence classification: one class for each text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.support.errors import InputError
from secateur.tasks.batches import Batch, Item, pad
from secateur.tasks.classification import Classification
from secateur.tasks.model_config import end_mark, padding_id, require_decoder_start, require_end_by_padding
from secateur.tasks.text import TextTask, warn_of_cuts


class SequenceClassification(Classification, TextTask):
    """One class for each text, or what else a model's config says of its outputs, as in `Classification`.

    An example's input is a text, or a pair of texts as a list of two, which cross-encoders read. Its target is a class name or
    its number, a list of these, or a number. The metric is accuracy, F1 or correlation.

    Args:
        tokenizer: The model's tokenizer.
        labels: The class names: the model's own (config.id2label, the default) in any order, or others in the order of the
            model's outputs.
        max_length: The most pieces of an input; by default the tokenizer's own limit, else the model's positions.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    name: ClassVar[str] = "sequence-classification"

    def why_not(self, model: nn.Module, ids: list[int]) -> str | None:
        """Return why the model cannot take an input: it reads a text at its end mark, and there is none, or one too many."""
        return _of_end_marks(model, ids, self._marks)

    def require_fit(self, model: nn.Module) -> None:
        """Refuse a model that does not fit the task.

        Raises:
            InputError: As for every task; or the model finds the end of a text by a field that its config lacks.
        """
        super().require_fit(model)
        require_end_by_padding(model)
        require_decoder_start(model)

    def model_inputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return a batch's inputs as keyword arguments for this model, padded with the id that its config names.

        Decoders find a text's last token by this id, which may be another one than the tokenizer's.
        """
        arguments: dict[str, Any] = dict(inputs)
        padding = padding_id(model)
        if getattr(getattr(model, "config", None), "type_vocab_size", 0) < 2:
            arguments.pop("token_type_ids", None)  # The model has no embedding of segments.
        if padding is not None:
            arguments["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, padding)
        if "use_cache" in inspect.signature(type(model).forward).parameters:
            arguments["use_cache"] = False
        return arguments

    def input_items(self, model: nn.Module, examples: Sequence[Example]) -> list[Item]:
        """Return the examples' inputs, encoded and cut, as items without targets. An input is a text, or a pair of texts.

        Raises:
            InputError: The model reads a text at its end mark, and an input has another number of end marks than the others.
        """
        pairs = {row: self._pair(example, row) for row, example in enumerate(examples) if not _is_text(example["input"])}
        single = [row for row in range(len(examples)) if row not in pairs]
        if pairs and single and end_mark(model) is not None:
            raise InputError("examples: expected texts or pairs of texts, as the model counts end marks, got both")
        items = super().input_items(model, [examples[row] for row in single]) if single else []
        items = [replace(item, row=row) for row, item in zip(single, items, strict=True)]
        return sorted([*items, *self._pair_items(model, pairs)], key=lambda item: item.row)

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Return items without targets as one batch, padded to `length` tokens at least."""
        batch = super().collate_inputs(items, device, length)
        if any(item.segments for item in items):
            segments = pad([item.segments for item in items], 0, device, batch.length)
            batch.inputs["token_type_ids"] = segments  # [B, T]
        return batch

    def _pair(self, example: Example, row: int) -> tuple[str, str]:
        """Return the pair of texts that is an example's input. Raise InputError for something else."""
        pair = example["input"]
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(_is_text, pair)):
            raise InputError(f"examples, row {row + 1}: expected a text or a pair of texts in column 'input', got {pair!r}")
        return pair[0], pair[1]

    def _pair_items(self, model: nn.Module, pairs: Mapping[int, tuple[str, str]]) -> list[Item]:
        """Return the items of pairs by row. The longer text of a pair is cut first, as in transformers."""
        if not pairs:
            return []
        texts: Any = [list(of_pairs) for of_pairs in zip(*pairs.values(), strict=True)]  # First texts and second texts.
        room = self.room(model)
        whole = self.tokenizer(*texts, verbose=False)["input_ids"]
        encoded = self.tokenizer(*texts, truncation=room is not None, max_length=room, verbose=False)
        warn_of_cuts(sum(a != b for a, b in zip(whole, encoded["input_ids"], strict=True)), len(whole), room)
        segments = encoded.get("token_type_ids") or [()] * len(pairs)
        marks = self.tokenizer("", "")["input_ids"]
        for row, ids in zip(pairs, encoded["input_ids"], strict=True):
            if (reason := _of_end_marks(model, ids, marks)) is not None:
                raise InputError(f"examples, row {row + 1}: {reason}")
        rows = zip(pairs, encoded["input_ids"], segments, strict=True)
        return [Item(row, ids, [], segments=tuple(of_row)) for row, ids, of_row in rows]


def _of_end_marks(model: nn.Module, ids: list[int], marks: list[int]) -> str | None:
    """Return why a model that reads inputs at their end mark cannot take one; None if it can.

    Args:
        model: The model.
        ids: The ids of the input.
        marks: The marks that the tokenizer adds to an input of this kind.
    """
    end = end_mark(model)
    if end is None or ids.count(end) == marks.count(end) > 0:
        return None
    expected = marks.count(end) if marks.count(end) > 1 else "one"
    return f"{ids.count(end)} end marks, at the last of which {type(model).__name__} reads a text; expected {expected}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
