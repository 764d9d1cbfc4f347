"""Windows: consecutive rows of a shard, encoded, sorted into batches of like length, and put back in order when scored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

import numpy as np
from torch import Tensor

from secateur.corpus.sources import Row
from secateur.support.errors import InputError
from secateur.tasks import Item, TextTask

# Of a window: enough that texts of like length find each other. Where lengths spread evenly, about 1 / BATCHES is padding.
BATCHES = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Window:
    """first: its first row's position in the shard, from 0. reasons: why a row is rejected; None: it is scored. scores [rows,
    labels]: float32 logarithms, each row's up to a constant. share: how much of the shard has been read at its end."""

    first: int
    share: float
    identities: list[Any]
    reasons: list[str | None]
    items: list[Item]
    scores: np.ndarray
    padded: int = 0
    done: Event = field(default_factory=Event)
    _left: int = field(init=False)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self._left = len(self.items)
        if not self.items:
            self.done.set()

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(len(item.input_ids) for item in self.items)

    @property
    def scored(self) -> int:
        """Rows that are not rejected."""
        return sum(reason is None for reason in self.reasons)

    def probabilities(self) -> np.ndarray:
        """Of each row's labels among each other [rows, labels], float64; of rejected rows without meaning."""
        scores = self.scores.astype(np.float64)
        likely = np.exp(scores - scores.max(1, keepdims=True))
        return np.asarray(likely / likely.sum(1, keepdims=True))

    def fill(self, items: Sequence[Item], scores: Tensor, padded: int) -> None:
        """Takes the scores [items, labels] of a batch, of so many tokens with padding; the last one makes the window done. From
        any thread."""
        values, rows = scores.float().cpu().numpy(), [item.row for item in items]
        with self._lock:
            self.scores[rows] = values
            self.padded += padded
            self._finish(len(items))

    def reject(self, item: Item, reason: str) -> None:
        """Gives an item up, in place of `fill`."""
        with self._lock:
            self.reasons[item.row] = reason
            self._finish(1)

    def _finish(self, items: int) -> None:
        self._left -= items
        if not self._left:
            self.done.set()


def windows(
    chunks: Iterable[tuple[list[Row], float]],
    task: TextTask,
    labels: int,
    *,
    max_tokens: int,
    on_long: str,
    limit: int | None = None,
) -> Iterator[Window]:
    """A shard's rows, as `Source.read` gives them, in windows of about BATCHES batches. limit: of rows.

    Where a window ends depends on the shard and max_tokens alone, so that another run makes the same batches.
    """
    first, rows, held = 0, _Rows(), 0
    for chunk, share in chunks:
        if limit is not None:
            chunk = chunk[: limit - held]
        held += len(chunk)
        rows.add(chunk, task, on_long)
        if rows.tokens >= BATCHES * max_tokens:
            yield rows.window(first, share, labels)
            first, rows = held, _Rows()
        if held == limit:
            break
    yield rows.window(first, 1.0, labels)


class _Rows:
    """Rows of a window that is being filled."""

    def __init__(self) -> None:
        self.identities: list[Any] = []
        self.reasons: list[str | None] = []
        self.items: list[Item] = []
        self.tokens = 0

    def add(self, chunk: Sequence[Row], task: TextTask, on_long: str) -> None:
        start = len(self.reasons)
        self.identities += [row.identity for row in chunk]
        self.reasons += [row.reason or why_not(row.value) for row in chunk]
        good = [k for k, reason in enumerate(self.reasons[start:]) if reason is None]
        encoded = task.encode([chunk[k].value for k in good]) if good else []
        room = task.room
        for k, ids in zip(good, encoded, strict=True):
            if room is not None and len(ids) > room and on_long == "error":
                self.reasons[start + k] = f"{len(ids)} tokens, of which the model takes {room}"
            else:
                self.items.append(Item(start + k, task.cut(ids), []))
                self.tokens += self.items[-1].length

    def window(self, first: int, share: float, labels: int) -> Window:
        scores = np.full((len(self.reasons), labels), np.nan, dtype=np.float32)
        return Window(first, share, self.identities, self.reasons, self.items, scores)


def why_not(value: Any) -> str | None:
    """Why a value cannot be scored; None: it can."""
    if value is None:
        return "null"
    if not isinstance(value, str):
        return f"expected text, got {type(value).__name__}"
    if not value or value.isspace():
        return "empty"
    return "not UTF-8" if _SURROGATE.search(value) else None


def require_on_long(on_long: str) -> None:
    """Raises InputError for what is neither "cut" nor "error"."""
    if on_long not in ("cut", "error"):
        raise InputError(f"on-long: expected cut or error, got {on_long!r}")
