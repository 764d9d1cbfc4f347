"""Token classification: one tag for each word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.columns import Columns
from secateur.data.examples import Example
from secateur.support.errors import InputError, first_line
from secateur.tasks.batches import IGNORED, Batch, Encoded, Item, model_device, pad
from secateur.tasks.classification import class_names, class_number
from secateur.tasks.generation import NotFiniteError
from secateur.tasks.long_texts import enough_words
from secateur.tasks.metrics import Evaluation, bootstrap, proportion
from secateur.tasks.model_config import OutputKind
from secateur.tasks.spans import has_words, is_of_entities, span_labels, spans_of, words_of, written_spans
from secateur.tasks.text import TextTask, warn_of_cuts, why_no_text


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


@dataclass(frozen=True)
class EncodedWords(Encoded):
    """The words of an input of a corpus, encoded and cut.

    Attributes:
        given: The input: a text, or a list of words.
        places: Where each word begins and ends in it, as in `written_spans`.
        words: The word of each piece that carries a tag. Words that were cut off, or have no piece, are not among them.
        pieces: The positions of these pieces.
    """

    given: Any = field(default=None, repr=False)
    places: list[tuple[int, int]] = field(default_factory=list, repr=False)
    words: list[int] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)

    def item(self, row: int) -> WordsItem:
        """Return the input as the item of a row, without a target."""
        return WordsItem(row, self.ids, [], self)


@dataclass(frozen=True)
class WordsItem(Item):
    """One input of a corpus.

    Attributes:
        encoded: Its words.
    """

    encoded: EncodedWords


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
        """An example as an item, whose target has the tag of each word at its first piece."""
        where = f"examples, row {row + 1}"
        tokens, tags = _words_and_tags(example, where)
        numbers = [class_number(names, tag, where) for tag in tags]
        (encoded,) = self._encode_words([tokens], room)
        if encoded.reason is not None:
            raise InputError(f"{where}: {encoded.reason}")
        target = [IGNORED] * len(encoded.ids)
        for piece, word in zip(encoded.pieces, encoded.words, strict=True):
            target[piece] = numbers[word]
        cut = room is not None and encoded.tokens > room
        return TaggedItem(row, encoded.ids, target, numbers, encoded.words, cut)

    def _encode_words(self, inputs: Sequence[list[str]], room: int | None) -> list[EncodedWords]:
        """Return lists of words, encoded and cut to `room`, or why the tokenizer cannot encode them."""
        try:
            return self._encode_all_words(inputs, room) if inputs else []
        except Exception as error:  # Tokenizers raise many types of error, also plain Exceptions.
            if len(inputs) == 1:
                return [EncodedWords([], 0, reason=f"the tokenizer cannot encode it: {first_line(error)}")]
            return [encoded for words in inputs for encoded in self._encode_words([words], room)]

    def _encode_all_words(self, inputs: Sequence[list[str]], room: int | None) -> list[EncodedWords]:
        """Return lists of words that the tokenizer can encode, encoded and cut to `room`."""
        last = getattr(self.tokenizer, "truncation_side", "right") == "left"
        tokenize = partial(self._tokenize, is_split_into_words=True)
        kept = [words if room is None else enough_words(tokenize, words, room, last=last) for words in inputs]
        options: dict[str, Any] = {"is_split_into_words": True, "truncation": room is not None, "max_length": room}
        encoded, marks = self.tokenizer(kept, **options), self.tokenizer.num_special_tokens_to_add()
        results = []
        for row, (words, ids) in enumerate(zip(inputs, encoded["input_ids"], strict=True)):
            skipped = len(words) - len(kept[row]) if last else 0
            of_pieces = encoded.word_ids(row)
            pieces = [k for k, word in enumerate(of_pieces) if word is not None and word not in of_pieces[max(k - 1, 0) : k]]
            beyond = sum(len(rest.ids) - marks for rest in encoded.encodings[row].overflowing)
            tagged = [of_pieces[piece] + skipped for piece in pieces]
            results.append(EncodedWords(ids, len(ids) + beyond, kept[row] == words, words=tagged, pieces=pieces))
        return results

    def why_no_input(self, value: Any) -> str | None:
        """Return why a value cannot be an input, as in `Task`: it must be a text or a list of words."""
        value = _listed(value)
        if not isinstance(value, (list, tuple)):
            return why_no_text(value) or (None if has_words(value) else "empty")
        other = next((word for word in value if not isinstance(word, str)), None)
        if other is not None or None in value:
            return f"expected a text or a list of words, got a list with a value of type {type(other).__name__}"
        return why_no_text(" ".join(value))

    def encode_cut_each(self, model: nn.Module, inputs: Sequence[Any], room: int | None) -> Sequence[Encoded]:
        """Return texts and lists of words, encoded and cut to `room`, in their order. The words of texts are `words_of`."""
        values, places, words = [_listed(value) for value in inputs], list[list[tuple[int, int]]](), list[list[str]]()
        for value in values:
            is_text = isinstance(value, str)
            places.append(words_of(value) if is_text else [(word, word + 1) for word in range(len(value))])
            words.append([value[start:end] for start, end in places[-1]] if is_text else list(value))
        encoded = zip(self._encode_words(words, room), values, places, strict=True)
        return [replace(one, given=value, places=of_value) for one, value, of_value in encoded]

    def collate_inputs(self, items: Sequence[Item], device: torch.device, length: int = 1) -> Batch:
        """Return items without targets as one batch, padded to `length` tokens at least, with their words."""
        batch = super().collate_inputs(items, device, length)
        batch.extra["words"] = [item.encoded for item in items if isinstance(item, WordsItem)]
        return batch

    def written(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Return the spans of each input of a batch.

        Returns:
            For each input a list of spans: `start`, `end` (characters of a text, positions in a list of words), `label`,
                `score` (the mean probability of its words' tags) and `text`.

        Raises:
            NotFiniteError: A logit is NaN or inf.
        """
        names = class_names(model, self.labels)
        entities = is_of_entities(names)
        probabilities, best = self.logits(model, batch).float().softmax(-1).max(-1)  # [B, T] each
        results = []
        for encoded, of_item, numbers in zip(batch.extra["words"], probabilities.tolist(), best.tolist(), strict=True):
            tags: list[str | None] = [None] * len(encoded.places)
            scores = [0.0] * len(encoded.places)
            for piece, word in zip(encoded.pieces, encoded.words, strict=True):
                tags[word], scores[word] = names[numbers[piece]], of_item[piece]
                if not math.isfinite(of_item[piece]):
                    raise NotFiniteError("examples: the model's outputs are not finite (NaN or inf)")
            results.append(written_spans(encoded.given, encoded.places, spans_of(tags, entities=entities), scores))
        return results

    def require_fit(self, model: nn.Module) -> None:
        """Refuse a model that does not fit the task.

        Raises:
            InputError: As for every task; or there is no room for a word beside the tokenizer's marks.
        """
        super().require_fit(model)
        room, marks = self.room(model), self.tokenizer.num_special_tokens_to_add()
        if room is not None and room <= marks:
            raise InputError(f"max_length: expected over {marks} pieces, which are the tokenizer's marks, got {room}")

    def output_kind(self, model: nn.Module) -> OutputKind:
        """Return "spans": the words of an input have labels."""
        return "spans"

    def label_names(self, model: nn.Module) -> list[str]:
        """Return the labels of spans."""
        return span_labels(class_names(model, self.labels))

    def ranked(self, model: nn.Module, examples: Sequence[Example], max_tokens: int) -> Tensor:
        """Raise InputError: words have labels, inputs have none."""
        raise InputError(f"task: expected one with a label for each input, got {type(self).__name__}")

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
        if not is_of_entities(names):
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
