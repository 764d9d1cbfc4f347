"""What a head on a shared encoder learns: a class, a number, or a span of the text."""

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
from secateur.support.errors import InputError
from secateur.tasks.classification import class_number
from secateur.tasks.metrics import Evaluation, bootstrap, proportion

Feature = dict[str, Any]


@dataclass(frozen=True)
class EncoderTask(ABC):
    """A task of a shared encoder. A feature is a dict with input_ids, token_type_ids where the tokenizer has them, a label, and
    the row of its example."""

    kind: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ("input", "target")
    by_token: ClassVar[bool] = False

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The width of the head."""

    @abstractmethod
    def features(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Feature]:
        """The examples tokenised, with their labels."""

    @abstractmethod
    def labels(self, values: Sequence[Any], device: torch.device) -> Tensor:
        """The labels of a batch's features."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch; logits [B, outputs], or [B, T, outputs] by token."""

    @abstractmethod
    def score(self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Tensor]) -> Evaluation:
        """The metric of the examples from the logits of their features, each on the CPU without padding."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Classification(EncoderTask):
    """One of the labels for each text, or for each pair of texts ("input" and "pair").

    metric: accuracy, or Matthews' correlation (CoLA) of two labels. Raises InputError: fewer than two labels, or a metric that
    is unknown or not for so many.
    """

    kind: ClassVar[str] = "classification"
    names: tuple[str, ...]
    metric: Literal["accuracy", "matthews"] = "accuracy"

    def __post_init__(self) -> None:
        if len(set(self.names)) < 2 or len(set(self.names)) < len(self.names):
            raise InputError(f"labels: expected at least two different labels, got {list(self.names)!r}")
        if self.metric not in ("accuracy", "matthews"):
            raise InputError(f"metric: expected accuracy or matthews, got {self.metric!r}")
        if self.metric == "matthews" and len(self.names) > 2:
            raise InputError(f"metric: expected accuracy with {len(self.names)} labels, got 'matthews'")

    @property
    def outputs(self) -> int:
        return len(self.names)

    def features(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Feature]:
        labels = [class_number(self.names, e["target"], f"examples, row {n}") for n, e in enumerate(examples, start=1)]
        return _features(tokenizer, examples, max_length, labels)

    def labels(self, values: Sequence[Any], device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), labels)

    def score(self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Tensor]) -> Evaluation:
        found = torch.stack(list(logits)).argmax(-1)
        wanted = torch.tensor([feature["label"] for feature in features])
        if self.metric == "matthews":  # Of two classes it is the correlation of their numbers.
            return bootstrap("matthews", len(wanted), lambda rows: _correlation(found[rows], wanted[rows]))
        return proportion("accuracy", int((found == wanted).sum()), len(wanted))


@dataclass(frozen=True)
class Regression(EncoderTask):
    """One number for each text or pair of texts; squared loss, Pearson's correlation (STS-B)."""

    kind: ClassVar[str] = "regression"

    @property
    def outputs(self) -> int:
        return 1

    def features(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Feature]:
        numbers = [_number(example["target"], row) for row, example in enumerate(examples, start=1)]
        return _features(tokenizer, examples, max_length, numbers)

    def labels(self, values: Sequence[Any], device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.mse_loss(logits.squeeze(-1).float(), labels)

    def score(self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Tensor]) -> Evaluation:
        found = torch.cat(list(logits))
        wanted = torch.tensor([feature["label"] for feature in features])
        return bootstrap("pearson", len(wanted), lambda rows: _correlation(found[rows], wanted[rows]))


@dataclass(frozen=True)
class Span(EncoderTask):
    """Where in "context" the answer to "question" stands, in SQuAD's columns: answers = {"text": [...], "answer_start": [...]}.

    Long contexts are read in windows that overlap by `stride` pieces, or by half of max_length where that is less. A question
    keeps a quarter of max_length. Metric: SQuAD's F1 of words (Rajpurkar et al. 2016, arXiv 1606.05250), of the best span of at
    most `longest` pieces.
    """

    kind: ClassVar[str] = "span"
    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    by_token: ClassVar[bool] = True
    shortest: ClassVar[int] = 20
    stride: int = 64
    longest: int = 30

    @property
    def outputs(self) -> int:
        return 2

    def features(self, tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Feature]:
        if max_length < self.shortest:
            raise InputError(f"max_length: expected at least {self.shortest} for a question and its context, got {max_length}")
        questions = [require_text(e, "question", n).strip() for n, e in enumerate(examples, start=1)]
        contexts = [require_text(e, "context", n) for n, e in enumerate(examples, start=1)]
        if not tokenizer.is_fast:
            raise InputError(f"tokenizer: expected a fast one, which tells where pieces stand, got {type(tokenizer).__name__}")
        # Beside a longer question, windows would overlap by all they hold, which tokenizers refuse.
        encoded = tokenizer(
            _cut(tokenizer, questions, max_length // 4), contexts, truncation="only_second", max_length=max_length,
            stride=min(self.stride, max_length // 2),
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        found = []
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            # Where each piece stands in the context; of the question's pieces and the marks None.
            sides, offsets = encoded.sequence_ids(window), encoded["offset_mapping"][window]
            places = [place if side == 1 else None for side, place in zip(sides, offsets, strict=True)]
            feature = {"input_ids": encoded["input_ids"][window], "row": row, "places": places}
            if "token_type_ids" in encoded:
                feature["token_type_ids"] = encoded["token_type_ids"][window]
            found.append(feature | {"label": _pieces(examples[row]["answers"], places, row + 1)})
        return found

    def labels(self, values: Sequence[Any], device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        starts, ends = logits.float().unbind(-1)
        return (nn.functional.cross_entropy(starts, labels[:, 0]) + nn.functional.cross_entropy(ends, labels[:, 1])) / 2

    def score(self, examples: Sequence[Example], features: Sequence[Feature], logits: Sequence[Tensor]) -> Evaluation:
        best: dict[int, tuple[float, str]] = {}
        for feature, of_feature in zip(features, logits, strict=True):
            row = feature["row"]
            value, start, end = self._best(of_feature, feature["places"])
            if row not in best or value > best[row][0]:
                best[row] = value, examples[row]["context"][start:end]
        found = [max(word_f1(best[n][1], text) for text in e["answers"]["text"]) for n, e in enumerate(examples)]
        return bootstrap("f1", len(found), lambda rows: sum(found[row] for row in rows) / len(rows))

    def _best(self, logits: Tensor, places: Sequence[tuple[int, int] | None]) -> tuple[float, int, int]:
        """The likeliest span of a window: its logit, and its place in the context."""
        inside = [piece for piece, place in enumerate(places) if place is not None]
        if not inside:
            return float("-inf"), 0, 0
        of_context = logits[inside].double()
        sums = of_context[:, 0].unsqueeze(1) + of_context[:, 1].unsqueeze(0)
        allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(self.longest - 1)
        start, end = divmod(int(sums.masked_fill(~allowed, float("-inf")).argmax()), len(inside))
        first, last = places[inside[start]], places[inside[end]]
        return float(sums[start, end]), (first or (0, 0))[0], (last or (0, 0))[1]


KINDS: dict[str, type[EncoderTask]] = {cls.kind: cls for cls in (Classification, Regression, Span)}


def task_from_json(about: Mapping[str, Any]) -> EncoderTask:
    """The task that `to_json` wrote. Raises InputError for another kind or other fields."""
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in about.items() if name != "kind"}
    try:
        return KINDS[about["kind"]](**settings)
    except (KeyError, TypeError) as error:
        raise InputError(f"tasks: expected one of the kinds {', '.join(KINDS)} with its settings, got {about!r}") from error


def word_f1(answer: str, wanted: str) -> float:
    """F1 of the words of two answers, without case, punctuation and articles."""
    ours, theirs = (Counter(_words(text)) for text in (answer, wanted))
    common = (ours & theirs).total()
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common / (ours.total() + theirs.total())


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _features(tokenizer: Any, examples: Sequence[Example], max_length: int, labels: Sequence[Any]) -> list[Feature]:
    first = [require_text(example, "input", number) for number, example in enumerate(examples, start=1)]
    pairs = [example.get("pair") for example in examples]
    if any(pair is not None for pair in pairs):
        texts = [first, [require_text(example, "pair", number) for number, example in enumerate(examples, start=1)]]
    else:
        texts = [first]
    marks = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if max_length <= marks:
        raise InputError(f"max_length: expected more than {marks}, which the tokenizer's marks take, got {max_length}")
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return [{"row": row, "label": label, **{name: encoded[name][row] for name in names}} for row, label in enumerate(labels)]


def _cut(tokenizer: Any, texts: Sequence[str], most: int) -> list[str]:
    """The beginnings of texts, of so many pieces at most."""
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=most, return_offsets_mapping=True)
    return [text[: places[-1][1]] if places else "" for text, places in zip(texts, encoded["offset_mapping"], strict=True)]


def _pieces(answers: Any, places: Sequence[tuple[int, int] | None], number: int) -> tuple[int, int]:
    """The first and last piece of the first answer, or (0, 0), the mark at the start, where the window lacks it."""
    try:
        text = answers["text"][0]
        # No piece begins or ends with the spaces that some answers have.
        start = int(answers["answer_start"][0]) + len(text) - len(text.lstrip())
        end = start + len(text.strip())
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        wanted = "answers with a text and an answer_start"
        raise InputError(f"examples, row {number}: expected {wanted}, got {json.dumps(answers, default=str)}") from error
    inside = [piece for piece, place in enumerate(places) if place is not None and place[0] < end and place[1] > start]
    whole = inside and (places[inside[0]] or (0, 0))[0] <= start and (places[inside[-1]] or (0, 0))[1] >= end
    return (inside[0], inside[-1]) if whole else (0, 0)


def _number(value: Any, row: int) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"examples, row {row}: expected a number as target, got {value!r}")
    return float(value)


def _correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's; 0 where one of them is constant."""
    found = torch.corrcoef(torch.stack([first.double(), second.double()]))[0, 1]
    return 0.0 if bool(found.isnan()) else float(found)
