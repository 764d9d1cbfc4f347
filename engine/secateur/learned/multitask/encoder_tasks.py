"""The tasks that a head on a shared encoder can learn: a class, a number, or a span of the text."""

from __future__ import annotations

import json
import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from secateur.data.examples import Example, require_text
from secateur.support.errors import FieldError, InputError
from secateur.support.fields import checked_fields, require_count, shown
from secateur.tasks.classification import class_number
from secateur.tasks.long_texts import shortened
from secateur.tasks.metrics import Evaluation, bootstrap, proportion
from secateur.tasks.pairs import encode_pairs

Feature = dict[str, Any]


@dataclass(frozen=True)
class EncoderTask(ABC):
    """A task of a shared encoder.

    A feature is a dict with "input_ids", "token_type_ids" if the tokenizer returns them, "label", and "row", the number of its
    example.

    Attributes:
        kind: The name of the kind of task.
        columns: The columns that an example must have.
        by_token: Whether the head gives logits for each token instead of each text.
    """

    kind: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ("input", "target")
    by_token: ClassVar[bool] = False

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The number of logits of the head."""

    @abstractmethod
    def features(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Feature]:
        """Tokenise examples.

        Args:
            tokenizer: The tokenizer.
            examples: The examples.
            max_length: The largest number of pieces of a feature. Longer texts are cut.

        Returns:
            The features with their labels.

        Raises:
            InputError: An example does not fit the task, or max_length is too small.
        """

    @abstractmethod
    def labels(self, values: Sequence[Any], device: torch.device) -> Tensor:
        """Build the label tensor of a batch.

        Args:
            values: The "label" of each feature.
            device: The device of the tensor.

        Returns:
            Labels: int64 [B] (class), float32 [B] (number) or int64 [B, 2] (first and last piece of a span).
        """

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean loss of a batch.

        Args:
            logits: Floating point [B, outputs], or [B, T, outputs] for a task by token.
            labels: The labels as `labels` builds them.

        Returns:
            A scalar tensor.
        """

    @abstractmethod
    def score(self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Tensor]) -> Evaluation:
        """Compute the metric of examples.

        Args:
            examples: The examples.
            features: Their features.
            logits: The logits of each feature, on the CPU and without padding: [outputs], or [T, outputs] for a task by token.

        Returns:
            The metric with its 95% interval.
        """

    def to_json(self) -> dict[str, Any]:
        """Return the kind and the settings as JSON values by name."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Classification(EncoderTask):
    """Classification of texts, or of pairs of texts ("input" and "pair").

    Args:
        names: The labels.
        metric: "accuracy", or "matthews" for Matthews' correlation of two labels (CoLA's metric).

    Raises:
        InputError: There are fewer than two different labels, a label occurs twice, or the metric is unknown or does not allow
            this number of labels.
    """

    kind: ClassVar[str] = "classification"
    names: tuple[str, ...]
    metric: Literal["accuracy", "matthews"] = "accuracy"

    def __post_init__(self) -> None:
        if isinstance(self.names, str):  # Its letters would be the labels.
            raise InputError(f"labels: expected several labels, got the text {self.names!r}")
        if len(set(self.names)) < 2 or len(set(self.names)) < len(self.names):
            raise InputError(f"labels: expected at least two different labels, got {list(self.names)!r}")
        if self.metric not in ("accuracy", "matthews"):
            raise InputError(f"metric: expected accuracy or matthews, got {self.metric!r}")
        if self.metric == "matthews" and len(self.names) > 2:
            raise InputError(f"metric: expected accuracy with {len(self.names)} labels, got 'matthews'")

    @property
    def outputs(self) -> int:
        """The number of labels."""
        return len(self.names)

    def features(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Feature]:
        """Tokenise texts; a feature's label is the number of its class."""
        labels = [class_number(self.names, e["target"], f"examples, row {n}") for n, e in enumerate(examples, start=1)]
        return _features(tokenizer, examples, max_length, labels)

    def labels(self, values: Sequence[Any], device: torch.device) -> Tensor:
        """Build class numbers, int64 [B]."""
        return torch.tensor(values, dtype=torch.int64, device=device)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the cross-entropy of logits [B, labels]."""
        return nn.functional.cross_entropy(logits.float(), labels)

    def score(self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Tensor]) -> Evaluation:
        """Compute the accuracy, or Matthews' correlation."""
        predicted = torch.stack(list(logits)).argmax(-1)  # [examples]
        true = torch.tensor([feature["label"] for feature in features])  # [examples]
        if self.metric == "matthews":  # For two classes it equals Pearson's correlation of the class numbers.
            return bootstrap("matthews", len(true), lambda rows: _correlation(predicted[rows], true[rows]))
        return proportion("accuracy", int((predicted == true).sum()), len(true))


@dataclass(frozen=True)
class Regression(EncoderTask):
    """Regression: a number for each text or pair of texts, with squared loss and Pearson's correlation (STS-B's metric)."""

    kind: ClassVar[str] = "regression"

    @property
    def outputs(self) -> int:
        """One logit, the predicted number."""
        return 1

    def features(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Feature]:
        """Tokenise texts; a feature's label is the target number."""
        numbers = [_number(example["target"], row) for row, example in enumerate(examples, start=1)]
        return _features(tokenizer, examples, max_length, numbers)

    def labels(self, values: Sequence[Any], device: torch.device) -> Tensor:
        """Build numbers, float32 [B]."""
        return torch.tensor(values, dtype=torch.float32, device=device)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean squared error of logits [B, 1]."""
        return nn.functional.mse_loss(logits.squeeze(-1).float(), labels)

    def score(self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Tensor]) -> Evaluation:
        """Compute Pearson's correlation."""
        predicted = torch.cat(list(logits))  # [examples]
        true = torch.tensor([feature["label"] for feature in features])  # [examples]
        return bootstrap("pearson", len(true), lambda rows: _correlation(predicted[rows], true[rows]))


@dataclass(frozen=True)
class Span(EncoderTask):
    """Extraction of the span of "context" that answers "question".

    Examples have SQuAD's columns, with answers = {"text": [...], "answer_start": [...]}. Long contexts are read in windows
    that overlap by `stride` pieces, or by half of max_length if that is less. A question is cut to a quarter of max_length. The
    metric is SQuAD's F1 of words, of the best span of at most `longest` pieces.

    Args:
        stride: The number of pieces by which windows overlap.
        longest: The largest number of pieces of an answer.

    Raises:
        InputError: The stride is below 0, or the longest answer has no pieces.

    References:
        Rajpurkar et al. 2016, arXiv 1606.05250 (SQuAD and its F1).
    """

    kind: ClassVar[str] = "span"
    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    by_token: ClassVar[bool] = True
    shortest: ClassVar[int] = 20
    stride: int = 64
    longest: int = 30

    def __post_init__(self) -> None:
        require_count("stride", self.stride, 0)
        require_count("longest", self.longest)

    @property
    def outputs(self) -> int:
        """Two logits for each token: for the first and for the last piece of the answer."""
        return 2

    def features(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Feature]:
        """Tokenise questions with windows of their contexts; a label is the first and last piece of the answer, or (0, 0)."""
        if max_length < self.shortest:
            raise InputError(f"max_length: expected at least {self.shortest} for a question and its context, got {max_length}")
        questions = [require_text(e, "question", n).strip() for n, e in enumerate(examples, start=1)]
        contexts = [require_text(e, "context", n) for n, e in enumerate(examples, start=1)]
        if not tokenizer.is_fast:
            name = type(tokenizer).__name__
            raise InputError(f"tokenizer: expected a fast one, which returns the positions of pieces in the text, got {name}")
        # With a longer question, a window's context would be no longer than the overlap, which tokenizers refuse.
        encoded = tokenizer(
            _cut(tokenizer, questions, max_length // 4), contexts, truncation="only_second", max_length=max_length,
            stride=min(self.stride, max_length // 2),
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        features = []
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            # The start and end of each piece in the context; None for the question's pieces and the special tokens.
            sides, offsets = encoded.sequence_ids(window), encoded["offset_mapping"][window]
            places = [place if side == 1 else None for side, place in zip(sides, offsets, strict=True)]
            feature = {"input_ids": encoded["input_ids"][window], "row": row, "places": places}
            if "token_type_ids" in encoded:
                feature["token_type_ids"] = encoded["token_type_ids"][window]
            features.append(feature | {"label": _answer_pieces(examples[row]["answers"], places, row + 1)})
        return features

    def labels(self, values: Sequence[Any], device: torch.device) -> Tensor:
        """Build first and last pieces, int64 [B, 2]."""
        return torch.tensor(values, dtype=torch.int64, device=device)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy of the first and of the last piece, for logits [B, T, 2]."""
        starts, ends = logits.float().unbind(-1)  # [B, T] each
        return (nn.functional.cross_entropy(starts, labels[:, 0]) + nn.functional.cross_entropy(ends, labels[:, 1])) / 2

    def score(self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Tensor]) -> Evaluation:
        """Compute SQuAD's F1: the best answer over the windows of a question, against the nearest true answer."""
        best: dict[int, tuple[float, str]] = {}  # by example: the logit and the text of its best span over all windows
        for feature, feature_logits in zip(features, logits, strict=True):
            row = feature["row"]
            value, start, end = self._best_span(feature_logits, feature["places"])
            if row not in best or value > best[row][0]:
                best[row] = value, examples[row]["context"][start:end]
        f1s = [max(word_f1(best[n][1], text) for text in e["answers"]["text"]) for n, e in enumerate(examples)]
        return bootstrap("f1", len(f1s), lambda rows: sum(f1s[row] for row in rows) / len(rows))

    def _best_span(self, logits: Tensor, places: Sequence[tuple[int, int] | None]) -> tuple[float, int, int]:
        """Find the most likely span of a window: its logit, and its start and end in the context."""
        inside = [piece for piece, place in enumerate(places) if place is not None]
        if not inside:
            return float("-inf"), 0, 0
        context_logits = logits[inside].double()  # [pieces of the context, 2]
        sums = context_logits[:, 0].unsqueeze(1) + context_logits[:, 1].unsqueeze(0)  # [first piece, last piece]
        # A span ends at or after its first piece and has at most `longest` pieces.
        allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(self.longest - 1)
        start, end = divmod(int(sums.masked_fill(~allowed, float("-inf")).argmax()), len(inside))
        first, last = places[inside[start]], places[inside[end]]
        return float(sums[start, end]), (first or (0, 0))[0], (last or (0, 0))[1]


KINDS: dict[str, type[EncoderTask]] = {cls.kind: cls for cls in (Classification, Regression, Span)}


def task_from_json(description: Mapping[str, Any]) -> EncoderTask:
    """Build a task from what `EncoderTask.to_json` returned.

    Args:
        description: The kind and the settings by name.

    Returns:
        The task.

    Raises:
        InputError: The kind or a setting is unknown, a setting is missing, or it has a wrong type or value.
    """
    kind = description.get("kind")
    settings = {name: value for name, value in description.items() if name != "kind"}
    try:
        cls = KINDS[kind] if isinstance(kind, str) else KINDS[""]
        return cls(**checked_fields(f"tasks, {kind}", settings, cls, whole=False))
    except (KeyError, FieldError) as error:
        why = f" ({error})" if isinstance(error, FieldError) else ""
        expected = f"expected one of the kinds {', '.join(KINDS)} with its settings"
        raise FieldError(f"tasks: {expected}, got {shown(description)}{why}") from error


def word_f1(answer: str, wanted: str) -> float:
    """Compute the F1 of the words of two answers, ignoring case, punctuation and articles.

    Args:
        answer: The predicted answer.
        wanted: A true answer.

    Returns:
        F1 in [0, 1]. If one of the answers has no words, 1 if both have none, else 0.

    References:
        Rajpurkar et al. 2016, arXiv 1606.05250.
    """
    answer_words, true_words = (Counter(_words(text)) for text in (answer, wanted))
    common = (answer_words & true_words).total()
    if not answer_words or not true_words:
        return float(answer_words == true_words)
    return 2 * common / (answer_words.total() + true_words.total())


def _words(text: str) -> list[str]:
    """Split a text into words, in lower case, without punctuation and articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _features(tokenizer: Any, examples: Sequence[Example], max_length: int, labels: Sequence[Any]) -> list[Feature]:
    """Tokenise texts, or pairs of texts if any example has a "pair"."""
    first = [require_text(example, "input", number) for number, example in enumerate(examples, start=1)]
    pairs = [example.get("pair") for example in examples]
    if any(pair is not None for pair in pairs):
        texts = [first, [require_text(example, "pair", number) for number, example in enumerate(examples, start=1)]]
    else:
        texts = [first]
    marks = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if max_length <= marks:
        raise InputError(f"max_length: expected more than {marks}, the number of the tokenizer's marks, got {max_length}")
    if len(texts) == 2:
        both = encode_pairs(tokenizer, list(zip(*texts, strict=True)), max_length)
        return [
            {"row": row, "label": label, "input_ids": one.ids, **({"token_type_ids": one.segments} if one.segments else {})}
            for row, (label, one) in enumerate(zip(labels, both, strict=True))
        ]
    short = [shortened(tokenizer, [text], max_length)[0] for text in first]
    encoded = tokenizer(short, truncation=True, max_length=max_length)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return [{"row": row, "label": label, **{name: encoded[name][row] for name in names}} for row, label in enumerate(labels)]


def _cut(tokenizer: Any, texts: Sequence[str], most: int) -> list[str]:
    """Cut texts to at most `most` pieces from their beginning."""
    texts = [shortened(tokenizer, [text], most)[0] for text in texts]
    encoded = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=most, return_offsets_mapping=True)
    return [text[: places[-1][1]] if places else "" for text, places in zip(texts, encoded["offset_mapping"], strict=True)]


def _answer_pieces(answers: Any, places: Sequence[tuple[int, int] | None], number: int) -> tuple[int, int]:
    """Find the first and last piece of the first answer; (0, 0), the mark at the start, if the window lacks a part of it."""
    try:
        text = answers["text"][0]
        # Some answers have spaces around them; no piece begins or ends with a space.
        start = int(answers["answer_start"][0]) + len(text) - len(text.lstrip())
        end = start + len(text.strip())
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        expected = "answers with a text and an answer_start"
        raise InputError(f"examples, row {number}: expected {expected}, got {json.dumps(answers, default=str)}") from error
    inside = [piece for piece, place in enumerate(places) if place is not None and place[0] < end and place[1] > start]
    is_whole = inside and (places[inside[0]] or (0, 0))[0] <= start and (places[inside[-1]] or (0, 0))[1] >= end
    return (inside[0], inside[-1]) if is_whole else (0, 0)


def _number(value: Any, row: int) -> float:
    """Convert a target to a float; raise InputError if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"examples, row {row}: expected a number as target, got {value!r}")
    return float(value)


def _correlation(first: Tensor, second: Tensor) -> float:
    """Compute Pearson's correlation; 0 if one of the two is constant."""
    correlation = torch.corrcoef(torch.stack([first.double(), second.double()]))[0, 1]
    return 0.0 if bool(correlation.isnan()) else float(correlation)
