"""TextTask: tasks whose inputs are texts that a tokenizer encodes."""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur.data.columns import Columns
from secateur.data.examples import Example
from secateur.data.formats import is_utf8
from secateur.model.positions import hard_limit, positions
from secateur.support.errors import InputError, first_line
from secateur.support.fields import require_count
from secateur.tasks.base import Task, texts
from secateur.tasks.batches import Batch, Encoded, Item, pad
from secateur.tasks.long_texts import LONG, ends_of
from secateur.tasks.model_config import OutputKind
from secateur.tasks.prompt import Prompt, as_prompt, columns_with

logger = logging.getLogger("secateur")
MOST_BEAMS = 100  # Each beam takes as much memory as a row; a typing error must not take all of it.


class TextTask(Task):
    """A task whose inputs are texts.

    Args:
        tokenizer: The model's tokenizer.
        labels: The candidate labels.
        max_length: The most pieces of an input; by default the tokenizer's own limit, else the model's positions.
        prompt: The text around each input, such as "topic: {input}", or a `Prompt` with a chat template; by default none.
        columns: The columns of the data by the task's columns, such as {"input": "text", "target": "label"}.

    Raises:
        InputError: An argument is wrong, or the tokenizer has no chat template for the prompt.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        labels: Sequence[str] | None = None,
        max_length: int | None = None,
        prompt: str | Prompt | None = None,
        columns: Columns | None = None,
    ) -> None:
        self.prompt = as_prompt(prompt)
        super().__init__(tokenizer, labels=labels, columns=columns_with(self.prompt, columns))
        if self.prompt is not None:
            self.prompted([""] * len(self.prompt.fields))  # Refuse a chat template that does not take it.
        if max_length is not None:
            require_count("max_length", max_length)
        known = getattr(tokenizer, "model_max_length", None)
        self.max_length = max_length or (known if known is not None and known < 100_000 else None)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.reader

    def generating(self, model: nn.Module, longest: int, beams: int = 1) -> Self:
        """Return the same task to generate texts, as in `Task`."""
        self.require_new_tokens(model, longest)
        require_count("beams", beams, most=MOST_BEAMS)
        task = copy.copy(self)
        task.new_tokens, task.beams = longest, beams
        return task

    def require_new_tokens(self, model: nn.Module, longest: int) -> None:
        """Check that a model can generate so many pieces. Raises InputError as `generating`."""
        raise InputError(f"task: expected one that generates text, got {type(self).__name__}")

    def generate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int, longest: int) -> list[str]:
        """Return the greedy output, of at most `longest` pieces, for each example's input.

        Raises:
            InputError: As `generating`; a logit is NaN or inf.
        """
        task, answers = self.generating(model, longest), [""] * len(examples)
        with task.scoring(model):
            for batch in task.input_batches(model, examples, max_tokens):
                for row, answer in zip(batch.rows, task.written(model, batch), strict=True):
                    answers[row] = answer
        return answers

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[None]:
        """A context as in `Task.scoring`. A task that generates runs the model as it is."""
        if self.new_tokens is None:
            with super().scoring(model):
                yield
        else:
            self.require_fit(model)
            yield

    def output_kind(self, model: nn.Module) -> OutputKind:
        """Return as `Task.output_kind`; "text" where the task generates."""
        return super().output_kind(model) if self.new_tokens is None else "text"

    def label_names(self, model: nn.Module) -> list[str]:
        """Return the candidate labels; none where the task generates."""
        return super().label_names(model) if self.new_tokens is None else []

    def why_no_input(self, value: Any) -> str | None:
        """Return why a value cannot be an input, as in `Task`: with the prompt, it must be a text, not empty, in UTF-8."""
        if value is None or self.prompt is None:
            return why_no_text(value)
        return self.prompt.why_not(value) or why_no_text(self.prompted(value))

    def blank(self, model: nn.Module, length: int) -> Item:
        """Return an item of one piece, repeated."""
        room = self.room(model)
        return Item(0, [1] * (length if room is None else min(length, room)), [])

    def prompted(self, value: Any) -> Any:
        """Return the prompt with an input in it; the input itself if there is no prompt."""
        return value if self.prompt is None else self.prompt.around(value, self.tokenizer)

    @cached_property
    def _kept_end(self) -> int:
        """The ids at the end of an input that no cut removes: the end mark, and the prompt's text after the input."""
        if self.prompt is None:
            return 1
        one, other = self.encode([self.prompted([text] * len(self.prompt.fields)) for text in ("a", "b c")])
        same = (a == b for a, b in zip(reversed(one), reversed(other), strict=False))
        return max(1, sum(itertools.takewhile(bool, same)))

    def encode(self, inputs: list[str], room: int | None = None) -> list[list[int]]:
        """Return the ids of inputs, uncut. A start mark that a text begins with, as chat templates write it, is there once.

        Args:
            inputs: The texts.
            room: The most ids of an input that are used. Of a text with far more characters only the first and the last `room`
                ids are returned: the ids between them would take much memory.
        """
        far = sys.maxsize if room is None else LONG * room
        ends = {row: ends_of(self._tokenize, text, room) for row, text in enumerate(inputs) if room and len(text) > far}
        whole = [text for row, text in enumerate(inputs) if ends.get(row) is None]
        tokenized = iter(self._tokenize(whole) if whole else [])
        encoded = [ends.get(row) or next(tokenized) for row in range(len(inputs))]
        mark, start = getattr(self.tokenizer, "bos_token", None), getattr(self.tokenizer, "bos_token_id", None)
        if mark is None:
            return encoded
        for row, (text, ids) in enumerate(zip(inputs, encoded, strict=True)):
            if text.startswith(mark) and ids[:2] == [start, start] and self._marks[:1] == [start]:
                encoded[row] = ids[1:]
        return encoded

    @cached_property
    def _marks(self) -> list[int]:
        """The marks that the tokenizer adds to a text."""
        return self._tokenize([""])[0]

    def encode_each(self, inputs: list[str], room: int | None = None) -> list[list[int] | str]:
        """Return `encode` of each input, or why the tokenizer cannot encode it."""
        try:
            return list(self.encode(inputs, room))
        except Exception as error:  # Tokenizers raise many types of error, also plain Exceptions.
            if len(inputs) == 1:
                return [f"the tokenizer cannot encode it: {first_line(error)}"]
            return [ids for text in inputs for ids in self.encode_each([text], room)]

    def limit(self, model: nn.Module) -> int | None:
        """Return the most ids of an input and its target that the model takes; None for any number.

        It is `max_length`, or else the model's positions. A table of position embeddings bounds both, and so does the length
        after which rotary positions change (`hard_limit`).
        """
        hard = hard_limit(model, self._reading_part(model))
        own = positions(model) if self.max_length is None else self.max_length
        return min((limit for limit in (own, hard) if limit is not None), default=None)

    def room(self, model: nn.Module) -> int | None:
        """Return the most ids of an input that the model takes; None for any number."""
        return self.limit(model)

    def cut(self, ids: list[int], room: int | None) -> list[int]:
        """Return at most `room` of an input's ids.

        The last ones always stay: the end-of-sequence mark of most tokenizers, and what the prompt says after the input.
        """
        if room is None or len(ids) <= room:
            return ids
        end = min(self._kept_end, room)
        return [*ids[: room - end], *ids[len(ids) - end :]]

    def why_not(self, model: nn.Module, ids: list[int]) -> str | None:
        """Return why the model cannot take an input of these ids, which are cut to its room; None if it can."""
        return None

    def encode_cut_each(self, model: nn.Module, inputs: Sequence[Any], room: int | None) -> Sequence[Encoded]:
        """Return inputs, encoded and cut to `room`, in their order."""
        return [self._cut_text(model, ids, room) for ids in self.encode_each(list(inputs), room)]

    def input_items(self, model: nn.Module, examples: Sequence[Example]) -> list[Item]:
        """Return the examples' inputs, encoded and cut, as items without targets.

        Raises:
            InputError: The tokenizer cannot encode an input, or the model cannot take it.
        """
        return self._items_cut_to(self.room(model), model, self._values(model, examples))

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Return items without targets as one batch, padded to `length` tokens at least."""
        return Batch(self._inputs(items, device, length), torch.empty(len(items), 0), [item.row for item in items])

    def require_fit(self, model: nn.Module) -> None:
        """Refuse a model that does not fit the task.

        Raises:
            InputError: As for every task; or the prompt leaves no room for an input.
        """
        super().require_fit(model)
        room = None if self.prompt is None else self.room(model)
        if self.prompt is not None and room is not None:
            (ids,) = self.encode([self.prompted([""] * len(self.prompt.fields))])
            if len(ids) >= room:
                raise InputError(f"prompt: expected under {room} pieces, which is what the model takes, got {len(ids)}")

    @classmethod
    def require_reader(cls, model: nn.Module, reader: Any) -> None:
        """Refuse a tokenizer with more pieces than the model's embedding has rows.

        More rows than pieces are fine: many embeddings are padded to a round number.

        Raises:
            InputError: The tokenizer has more pieces.
        """
        if not hasattr(reader, "__len__"):
            return  # A user's own tokenizer may not say how many pieces it has.
        try:
            rows, pieces = len(model.get_input_embeddings().weight), len(reader)  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return  # A user's own model class may not say where its embedding is.
        if pieces > rows:
            raise InputError(
                f"tokenizer: expected at most {rows} pieces, the rows of the model's embedding, got a tokenizer with {pieces}: "
                "does it belong to the model?"
            )

    def _inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> dict[str, Tensor]:
        """Return the items' padded input ids and their padding mask, both [B, T].

        Without a padding piece the end mark pads; the mask hides it.
        """
        padding = self.tokenizer.pad_token_id
        sequences = [item.input_ids for item in items]
        ids = pad(sequences, self.tokenizer.eos_token_id if padding is None else padding, device, length)
        return {"input_ids": ids, "attention_mask": pad([[1] * len(sequence) for sequence in sequences], 0, device, length)}

    def _tokenize(self, inputs: list[Any], **options: Any) -> list[list[int]]:
        encoded: list[list[int]] = self.tokenizer(inputs, truncation=False, verbose=False, **options)["input_ids"]
        return encoded

    def _reading_part(self, model: nn.Module) -> nn.Module:
        """The part of the model that reads the input."""
        return model

    def _encoded(self, examples: Sequence[Example], room: int | None) -> list[list[int]]:
        """Return `encode` of the examples' inputs. Raises InputError for one that the tokenizer cannot encode."""
        encoded = self.encode_each(self._texts(examples), room)
        return [_of_row(number, ids) for number, ids in enumerate(encoded, start=1)]

    def _encode_cut(self, model: nn.Module, examples: Sequence[Example], room: int | None) -> list[list[int]]:
        """Return the ids of the examples' inputs, cut to `room`. Raises InputError as `input_items`."""
        return [item.input_ids for item in self._items_cut_to(room, model, self._texts(examples))]

    def _values(self, model: nn.Module, examples: Sequence[Example]) -> list[Any]:
        """The examples' inputs. Raises InputError for one of another type than the task takes."""
        return self._texts(examples)

    def _texts(self, examples: Sequence[Example]) -> list[str]:
        """The examples' inputs, in the prompt. Raises InputError for one that is no text, or not what the prompt needs."""
        if self.prompt is None:
            return texts(examples, "input")
        for number, example in enumerate(examples, start=1):
            if (reason := self.prompt.why_not(example["input"])) is not None:
                raise InputError(f"examples, row {number}: {reason}")
        return [self.prompted(example["input"]) for example in examples]

    def _items_cut_to(self, room: int | None, model: nn.Module, inputs: Sequence[Any]) -> list[Item]:
        """Return inputs, encoded and cut to `room`, as items, with a warning if any is cut."""
        encoded = self.encode_cut_each(model, inputs, room)
        warn_of_cuts(sum(room is not None and one.tokens > room for one in encoded), len(encoded), room)
        for number, one in enumerate(encoded, start=1):
            _of_row(number, one.reason or one.ids)
        return [one.item(row) for row, one in enumerate(encoded)]

    def _cut_text(self, model: nn.Module, ids: list[int] | str, room: int | None) -> Encoded:
        """Return one text's ids, cut to `room`, or the reason why there are none."""
        if isinstance(ids, str):
            return Encoded([], 0, reason=ids)
        cut = self.cut(ids, room)
        # `encode` leaves out the middle of a very long text, so that 2 * room ids are left.
        return Encoded(cut, len(ids), room is None or len(ids) != 2 * room, self.why_not(model, cut))


def why_no_text(value: Any) -> str | None:
    """Return why a value is no text that can be scored; None if it is one."""
    if value is None:
        return "null"
    if not isinstance(value, str):
        return f"expected text, got {type(value).__name__}"
    if not value or value.isspace():
        return "empty"
    return None if is_utf8(value) else "not UTF-8"


def warn_of_cuts(too_long: int, inputs: int, room: int | None) -> None:
    """Warn that some inputs are cut, if any is."""
    if too_long:
        logger.warning("%d of %d inputs are longer than %d pieces and were cut", too_long, inputs, room)


def _of_row(number: int, ids: list[int] | str) -> list[int]:
    """The ids of an example's input. Raises InputError for the reason why there are none."""
    if isinstance(ids, str):
        raise InputError(f"examples, row {number}: {ids}")
    return ids
