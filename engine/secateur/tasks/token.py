"""Token classification: one tag for each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.columns import Columns
from secateur.data.examples import Example
from secateur.support.errors import InputError, first_line
from secateur.tasks.batches import IGNORED, Batch, Item, model_device, pad
from secateur.tasks.classification import class_names, class_number
from secateur.tasks.long_texts import enough_words
from secateur.tasks.metrics import Evaluation, bootstrap, proportion
from secateur.tasks.text import TextTask, warn_of_cuts


@dataclass(frozen=True)
class TaggedItem(Item):
    """One example.

    Attributes:
        tags: The class of each word.
        words: The word of each piece that carries a tag. Words that were cut off, or have no piece, are not among them.
        cut: Whether words were cut off.
    """

    tags: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    cut: bool = False


class TokenClassification(TextTask):
    """One tag for each word.

    An example has `tokens` (words) and `tags` (names or numbers). A word is tagged at its first piece. The metric is the F1 of
    entities as seqeval defines it (extra `tagging`) where the tags are BIO or BIOES, otherwise the accuracy of words. Words
    without a piece, or that were cut off, count as words that the model tags O.

    Args:
        tokenizer: The model's tokenizer.
        labels: The tags: the model's own (config.id2label, the default) in any order, or others in the order of its outputs.
        max_length: The most pieces of an input; by default the tokenizer's own limit, else the model's positions.
        columns: The columns of the data by the task's columns, as in `TextTask`.

    Raises:
        InputError: The tokenizer does not tell the pieces of each word, or drops the space before a word.
    """

    columns: ClassVar[tuple[str, ...]] = ("tokens", "tags")
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    name: ClassVar[str] = "token-classification"
    labels_from_model: ClassVar[bool] = True

    def __init__(
        self,
        tokenizer: Any,
        *,
        labels: Sequence[str] | None = None,
        max_length: int | None = None,
        columns: Columns | None = None,
    ) -> None:
        super().__init__(tokenizer, labels=labels, max_length=max_length, columns=columns)
        fast, name = getattr(tokenizer, "is_fast", None), type(tokenizer).__name__
        if fast is False:
            raise InputError(f"tokenizer: expected a fast tokenizer, which tells the pieces of each word, got {name}")
        if fast and tokenizer(["a", "a"], is_split_into_words=True)["input_ids"] != tokenizer("a a")["input_ids"]:
            raise InputError(
                f"tokenizer: expected one that keeps the space before a word, got {name}, which drops it from words: "
                "load it with add_prefix_space=True"
            )

    def items(self, model: nn.Module, examples: Sequence[Example], *, all_labels: bool = False) -> list[Item]:
        """Return the examples as items, whose target is the tag of each word. Raises InputError with all_labels."""
        if all_labels:
            raise InputError("criterion: all candidate labels are for tasks with one target an example, not for tags")
        return list(self._tagged(model, examples))

    def _tagged(self, model: nn.Module, examples: Sequence[Example]) -> list[TaggedItem]:
        """The examples as items, with a warning if any is cut."""
        names, room = class_names(model, self.labels), self.room(model)
        items = [self._item(names, row, example, room) for row, example in enumerate(examples)]
        warn_of_cuts(sum(item.cut for item in items), len(items), room)
        return items

    def _item(self, names: list[str], row: int, example: Example, room: int | None) -> TaggedItem:
        where = f"examples, row {row + 1}"
        tokens, tags = _words_and_tags(example, where)
        numbers = [class_number(names, tag, where) for tag in tags]
        last = getattr(self.tokenizer, "truncation_side", "right") == "left"
        options: dict[str, Any] = {"is_split_into_words": True, "truncation": room is not None, "max_length": room}
        tokenize = partial(self._tokenize, is_split_into_words=True)
        try:
            kept = tokens if room is None else enough_words(tokenize, tokens, room, last=last)
            encoded = self.tokenizer(kept, **options)
        except Exception as error:  # Tokenizers raise many types of error, also plain Exceptions.
            raise InputError(f"{where}: the tokenizer cannot encode it: {first_line(error)}") from error
        target, words, previous, skipped = list[int](), list[int](), None, len(tokens) - len(kept) if last else 0
        for word in encoded.word_ids():
            first = word is not None and word != previous
            target.append(numbers[word + skipped] if first else IGNORED)
            words += [word + skipped] if first else []
            previous = word
        return TaggedItem(row, encoded["input_ids"], target, numbers, words, bool(encoded.encodings[0].overflowing))

    def collate(self, items: Sequence[Item], device: torch.device) -> Batch:
        """Return the items as one padded batch with labels [B, T], -100 at pieces without a tag."""
        return Batch(
            self._inputs(items, device), pad([item.target for item in items], IGNORED, device), [item.row for item in items]
        )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits [B, T, tags] of an ordinary forward pass."""
        output: Any = model(**batch.inputs)
        logits: Tensor = output.logits
        return logits

    def require_variety(self, examples: Sequence[Example]) -> None:
        """Accept any examples: each has many tags."""

    def label_names(self, model: nn.Module) -> list[str]:
        """Raise InputError: words have labels, inputs have none."""
        raise InputError(f"task: expected one with a label for each input, got {type(self).__name__}")

    def predictions(self, model: nn.Module, examples: Sequence[Example], max_tokens: int, longest: int) -> list[dict[str, Any]]:
        """Return the predicted tag of each word, as `prediction`."""
        return [{"prediction": tags} for tags in self._guess(model, examples, max_tokens)]

    def expected(self, model: nn.Module, examples: Sequence[Example]) -> list[Any]:
        """Return the names of the tags."""
        names = class_names(model, self.labels)
        expected: list[Any] = []
        for number, example in enumerate(examples, start=1):
            where = f"examples, row {number}"
            expected.append([names[class_number(names, tag, where)] for tag in _words_and_tags(example, where)[1]])
        return expected

    def _guess(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> list[list[str]]:
        """The predicted tag of each word."""
        names, items = class_names(model, self.labels), self._tagged(model, examples)
        # Words that were cut off, or have no piece, are outside of all entities.
        guess = [["O" if "O" in names else ""] * len(item.tags) for item in items]
        for batch in self.batches(items, model_device(model), max_tokens):
            best = self.finite(model, batch, self.logits).argmax(-1)
            for row, labels, predicted in zip(batch.rows, batch.labels, best, strict=True):
                for word, tag in zip(items[row].words, predicted[labels != IGNORED].tolist(), strict=True):
                    guess[row][word] = names[tag]
        return guess

    def evaluate(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Evaluation:
        """Return the F1 of entities or the accuracy of words of a model in eval mode."""
        names = class_names(model, self.labels)
        truth, guess = self.expected(model, examples), self._guess(model, examples, max_tokens)
        if not all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-") for name in names):
            right = sum(a == b for pair in zip(truth, guess, strict=True) for a, b in zip(*pair, strict=True))
            return proportion("word accuracy", right, sum(map(len, truth)))
        return bootstrap("F1", len(examples), lambda rows: _f1([truth[r] for r in rows], [guess[r] for r in rows]))


def _words_and_tags(example: Example, where: str) -> tuple[list[str], list[Any]]:
    """Return an example's words and tags. Raises InputError unless there are words, with a tag each."""
    tokens, tags = (_listed(example[column]) for column in ("tokens", "tags"))
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{where}: expected a list of words in column 'tokens', got {tokens!r}")
    if not isinstance(tags, list) or len(tags) != len(tokens):
        count = len(tags) if isinstance(tags, list) else type(tags).__name__
        raise InputError(f"{where}: expected {len(tokens)} tags in column 'tags', one a word, got {count}")
    return tokens, tags


def _listed(value: Any) -> Any:
    """A value as it is; an array of a data set's format, such as NumPy's, as a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def _f1(truth: list[list[str]], guess: list[list[str]]) -> float:
    try:
        from seqeval.metrics import f1_score
    except ImportError as error:
        raise InputError("metric: entity F1 needs the extra 'tagging': pip install 'secateur[tagging]'") from error
    return float(f1_score(truth, guess, zero_division=0))
