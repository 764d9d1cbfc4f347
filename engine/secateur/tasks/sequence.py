"""Sequence classification: one class for each text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.examples import Example
from secateur.support.errors import InputError, first_line
from secateur.tasks.batches import Batch, Encoded, Item, pad
from secateur.tasks.classification import Classification
from secateur.tasks.model_config import end_mark, padding_id, require_decoder_start, require_end_by_padding
from secateur.tasks.pairs import encode_pairs, is_pair, marks_of_pairs
from secateur.tasks.text import TextTask, why_no_text


class SequenceClassification(Classification, TextTask):
    """One class for each text, or what else a model's config says of its outputs, as in `Classification`.

    An example's input is a text, or a pair of texts as a list of two, which cross-encoders read. Its target is a class name or
    its number, a list of these, or a number. The metric is accuracy, F1 or correlation.

    Args:
        tokenizer: The model's tokenizer.
        labels: The class names: the model's own (config.id2label, the default) in any order, or others in the order of the
            model's outputs.
        max_length: The most pieces of an input; by default the tokenizer's own limit, else the model's positions.
        prompt: The text around each input, as in `TextTask`.
        columns: The columns of the data by the task's columns, as in `TextTask`.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    name: ClassVar[str] = "sequence-classification"
    takes_pairs: ClassVar[bool] = True

    def why_no_input(self, value: Any) -> str | None:
        """Return why a value cannot be an input, as in `TextTask`; without a prompt, two texts are one too."""
        if self.prompt is not None or not isinstance(value, (list, tuple)):
            return super().why_no_input(value)
        if not is_pair(value):
            return f"expected a text or a pair of texts, got a list of {len(value)}"
        reasons = {name: why_no_text(text) for name, text in zip(("first", "second"), value, strict=True)}
        return next((f"the {name} text of the pair: {reason}" for name, reason in reasons.items() if reason), None)

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

    def encode_cut_each(self, model: nn.Module, inputs: Sequence[Any], room: int | None) -> Sequence[Encoded]:
        """Return texts and pairs of texts, encoded and cut to `room`, in their order.

        The longer text of a pair is cut first, as in transformers.
        """
        single = iter(super().encode_cut_each(model, [text for text in inputs if _is_text(text)], room))
        pairs = iter(self._encode_pairs(model, [pair for pair in inputs if not _is_text(pair)], room))
        return [next(single if _is_text(text) else pairs) for text in inputs]

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Return items without targets as one batch, padded to `length` tokens at least."""
        batch = super().collate_inputs(items, device, length)
        if any(item.segments for item in items):
            segments = pad([item.segments for item in items], 0, device, batch.length)
            batch.inputs["token_type_ids"] = segments  # [B, T]
        return batch

    def _values(self, model: nn.Module, examples: Sequence[Example]) -> list[Any]:
        """The examples' inputs: texts, and pairs of texts.

        Raises:
            InputError: An input is something else; or some are texts and others pairs, and the model counts end marks.
        """
        if self.prompt is not None:
            return super()._values(model, examples)
        inputs = [example["input"] for example in examples]
        for row, value in enumerate(inputs, start=1):
            if not _is_text(value) and (not is_pair(value) or not all(map(_is_text, value))):
                raise InputError(f"examples, row {row}: expected a text or a pair of texts in column 'input', got {value!r}")
        if len(set(map(_is_text, inputs))) > 1 and end_mark(model) is not None:
            raise InputError("examples: expected texts or pairs of texts, as the model counts end marks, got both")
        return inputs

    def _encode_pairs(self, model: nn.Module, pairs: Sequence[Sequence[str]], room: int | None) -> list[Encoded]:
        """Return pairs, encoded and cut to `room`, or why the tokenizer or the model cannot take them."""
        try:
            return self._encode_all_pairs(model, pairs, room) if pairs else []
        except Exception as error:  # Tokenizers raise many types of error, also plain Exceptions.
            if len(pairs) == 1:
                return [Encoded([], 0, reason=f"the tokenizer cannot encode it: {first_line(error)}", pair=True)]
            return [encoded for pair in pairs for encoded in self._encode_pairs(model, [pair], room)]

    def _encode_all_pairs(self, model: nn.Module, pairs: Sequence[Sequence[str]], room: int | None) -> list[Encoded]:
        """Return pairs that the tokenizer can encode, encoded and cut to `room`."""
        marks = marks_of_pairs(self.tokenizer)
        return [
            Encoded(
                one.ids, one.tokens, one.exact, _of_end_marks(model, one.ids, marks), pair=True, segments=tuple(one.segments)
            )
            for one in encode_pairs(self.tokenizer, pairs, room)
        ]


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
