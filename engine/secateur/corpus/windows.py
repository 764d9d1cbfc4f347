"""Windows: consecutive rows of a shard, encoded, sorted into batches of similar length, and put back in order when scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur.corpus.sources import Row
from secateur.support.errors import InputError
from secateur.tasks import Item, Task
from secateur.tasks.model_config import OutputKind

# Batches in a window: enough that texts of similar length share a batch. For evenly spread lengths, about 1 / BATCHES of the
# tokens are padding.
BATCHES = 64
NOT_FINITE = "not finite: the model's scores are NaN or inf"
# Kinds of results that are no scores.
WRITTEN: tuple[OutputKind, ...] = ("text", "spans")


@dataclass
class Window:
    """Consecutive rows of a shard.

    Attributes:
        first: The position of its first row in the shard's file, from 0.
        share: The share of the shard that has been read at its end.
        kept: The values of each row in the columns that are carried over.
        reasons: Why a row is rejected; None if it is scored.
        items: The encoded rows. The `row` of an item is its index in the window.
        scores: float32 [rows, labels], as `Task.ranked` returns them for outputs of this kind.
        padded: Tokens with padding.
        kept_types: The Arrow types of these columns.
        kind: The meaning of the scores: one label is right, any number of labels, or a value. With "text" and "spans" results
            are in `written`, and there are no scores.
        written: The result of each row that is no score, by its index: a generated text, or spans.
        done: Set once all items are scored or rejected.
    """

    first: int
    share: float
    kept: list[tuple[Any, ...]]
    reasons: list[str | None]
    items: list[Item]
    scores: np.ndarray
    padded: int = 0
    kept_types: tuple[Any, ...] = ()
    kind: OutputKind = "label"
    written: dict[int, Any] = field(default_factory=dict)
    done: Event = field(default_factory=Event)
    _left: int = field(init=False)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self._left = len(self.items)
        if not self.items:
            self.done.set()

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(item.tokens for item in self.items)

    @property
    def scored(self) -> int:
        """Rows that are not rejected."""
        return sum(reason is None for reason in self.reasons)

    def probabilities(self) -> np.ndarray:
        """Return each row's probabilities, float64 [rows, labels], or values [rows, 1]. Rejected rows have meaningless ones.

        Where one label is right, they are the probabilities among the labels.
        """
        scores = self.scores.astype(np.float64)
        if self.kind != "label":
            return 1 / (1 + np.exp(-scores)) if self.kind == "labels" else scores
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return np.asarray(weights / weights.sum(1, keepdims=True))

    def fill(self, items: Sequence[Item], scores: Tensor, padded: int) -> None:
        """Store the scores of a batch. The last batch makes the window done. Any thread may call it.

        An item whose scores are NaN or inf is rejected.

        Args:
            items: The items of the batch.
            scores: Their scores [items, labels].
            padded: Tokens of the batch, with padding.
        """
        values, rows = scores.float().cpu().numpy(), [item.row for item in items]
        with self._lock:
            self.scores[rows] = values  # [items, labels]
            for row in np.array(rows)[~np.isfinite(values).all(1)].tolist():
                self.reasons[row] = NOT_FINITE
            self.padded += padded
            self._finish(len(items))

    def write(self, items: Sequence[Item], results: Sequence[Any], padded: int) -> None:
        """Store the texts or spans of a batch, instead of `fill`."""
        with self._lock:
            self.written.update(zip((item.row for item in items), results, strict=True))
            self.padded += padded
            self._finish(len(items))

    def reject(self, item: Item, reason: str) -> None:
        """Reject an item, instead of `fill`."""
        with self._lock:
            self.reasons[item.row] = reason
            self._finish(1)

    def _finish(self, items: int) -> None:
        """Count items that are done."""
        self._left -= items
        if not self._left:
            self.done.set()


def windows(
    chunks: Iterable[tuple[Sequence[Row], float]],
    task: Task,
    model: nn.Module,
    labels: int,
    *,
    max_tokens: int,
    on_long: str,
    limit: int | None = None,
    first: int = 0,
) -> Iterator[Window]:
    """Group the rows of a shard into windows of about BATCHES batches.

    The end of a window depends only on the shard and max_tokens, so another run makes the same batches.

    Args:
        chunks: Rows with the share of the shard that is read, from `Source.read`.
        task: The task, which encodes the rows.
        model: The model, which decides how long and what rows may be.
        labels: The number of labels.
        max_tokens: Padded input tokens in a batch.
        on_long: What happens to inputs that are longer than the model takes: "cut" or "error".
        limit: The most rows.
        first: The position of the first row in the shard's file.
    """
    room, kind = task.room(model), task.output_kind(model)
    start, rows, read = first, _Rows(), 0
    for chunk, share in chunks:
        rows.kept_types = getattr(chunk, "kept_types", ())  # Rows has it, another list has not.
        if limit is not None:
            chunk = chunk[: limit - read]
        read += len(chunk)
        rows.add(chunk, task, model, room, on_long)
        if rows.tokens >= BATCHES * max_tokens:
            yield rows.window(first, share, labels, kind)
            first, rows = start + read, _Rows()
        if read == limit:
            break
    yield rows.window(first, 1.0, labels, kind)


class _Rows:
    """The rows of a window that is being filled."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, ...]] = []
        self.reasons: list[str | None] = []
        self.items: list[Item] = []
        self.tokens = 0
        self.kept_types: tuple[Any, ...] = ()

    def add(self, chunk: Sequence[Row], task: Task, model: nn.Module, room: int | None, on_long: str) -> None:
        """Encode rows, cut them to `room`, and add them."""
        start = len(self.reasons)
        self.kept += [row.kept for row in chunk]
        self.reasons += [row.reason or task.why_no_input(row.value) for row in chunk]
        usable = [k for k, reason in enumerate(self.reasons[start:]) if reason is None]
        inputs = task.encode_cut_each(model, [task.prompted(chunk[k].value) for k in usable], room) if usable else []
        for k, encoded in zip(usable, inputs, strict=True):
            reason = encoded.reason
            if room is not None and encoded.tokens > room and on_long == "error":
                least = "" if encoded.exact else "at least "
                reason = f"{least}{encoded.tokens} tokens, of which the model takes {room}"
            self.reasons[start + k] = reason
            if reason is None:
                self.items.append(encoded.item(start + k))
                self.tokens += self.items[-1].length

    def window(self, first: int, share: float, labels: int, kind: OutputKind) -> Window:
        """The finished window."""
        scores = np.full((len(self.reasons), labels), np.nan, dtype=np.float32)  # [rows, labels]
        about: dict[str, Any] = {"kept_types": self.kept_types, "kind": kind}
        return Window(first, share, self.kept, self.reasons, self.items, scores, **about)


def require_on_long(on_long: str) -> None:
    """Check `on_long`.

    Raises:
        InputError: It is neither "cut" nor "error".
    """
    if on_long not in ("cut", "error"):
        raise InputError(f"on-long: expected cut or error, got {on_long!r}")


def require_input_columns(task: Task, columns: Sequence[str]) -> None:
    """Check the number of the columns of the input: a tagger would take the texts of several columns for words.

    Raises:
        InputError: There are several, and the task takes no pairs of texts and no prompt for so many.
    """
    most = len(task.prompt.fields) if task.prompt is not None else 2 if task.takes_pairs else 1
    if len(columns) > most:
        expected = "one column" if most == 1 else f"at most {most} columns"
        raise InputError(f"input-column: expected {expected} for {task.name}, got {', '.join(map(repr, columns))}")
