"""Scoring as a library: from any iterable of texts to Arrow record batches, and a function for `datasets.map`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.corpus.openvino_runtime import require_openvino
from secateur.corpus.output import output_names, record_batch, require_free_name, result_type, schema_of, with_reasons
from secateur.corpus.pipeline import Runner, scored
from secateur.corpus.sources import Row, ShardError, Source, column_names, find_sources
from secateur.corpus.tuning import RUNTIMES, untuned
from secateur.corpus.windows import Window, require_input_columns, require_on_long, windows
from secateur.data.examples import rows_in_memory
from secateur.support.errors import InputError
from secateur.support.fields import require_count
from secateur.tasks import Task
from secateur.tasks.base import require_fit

if TYPE_CHECKING:
    import pyarrow


def score(
    model: nn.Module,
    task: Task,
    dataset: str | Path | Iterable[str | Sequence[str] | None] | Iterable[Mapping[str, Any]],
    *,
    column: str | Sequence[str] = "text",
    identity: str | Sequence[str] | None = None,
    on_long: str = "cut",
    max_tokens: int | None = None,
    threads: int | None = None,
    max_new_tokens: int | None = None,
    beams: int = 1,
    engine_runtime: str = "torch",
) -> Iterator[pyarrow.RecordBatch]:
    """Score a stream of documents in order, in bounded memory.

    Args:
        model: The model.
        task: A task with closed labels; or, with `max_new_tokens`, one that generates text.
        dataset: Mappings that have `column` (a `datasets.Dataset` is one), inputs, a pandas or polars DataFrame, a pyarrow
            Table, a dict of columns, or a name that `find_sources` takes. An input is a text; for a `SequenceClassification`
            also a pair of texts, a list or tuple of two; for a `TokenClassification` also a list of words; for an
            `ImageClassification` an image, as there.
        column: The column of the input, or the columns of its texts.
        identity: The column to carry over into the result, or several.
        on_long: What happens to inputs that are longer than the model takes: "cut", or "error" to reject them.
        max_tokens: Padded input tokens in a batch.
        threads: CPU threads, each of which runs its own batches. None means all usable cores.
        max_new_tokens: Generate text, of at most so many tokens: the result is then the column text alone.
        beams: The number of beams to generate with; 1 is greedy.
        engine_runtime: "torch", or "openvino" for classifiers on a CPU (extra `openvino`). The command line's "auto" measures.

    Yields:
        Record batches with a row for each document: row (its position in its shard), the identity, label (the most likely one),
            p_<label> (float32, its probability among the labels), and reason (why there is no label, else null). Models for
            several labels, models with one output and taggers have other columns in place of label, as `schema_of` says.

    Raises:
        InputError: The task has no closed labels, the model does not fit it, `on_long` is unknown, a shard cannot be read,
            `identity` is a name of the other columns, or the runtime is unknown, missing or does not take the model.
    """
    require_on_long(on_long)
    require_fit(task, model)
    require_input_columns(task, column_names(column))
    if max_new_tokens is not None:
        require_count("max_new_tokens", max_new_tokens)
        task = task.generating(model, max_new_tokens, beams)
    elif beams != 1:
        raise InputError(f"beams: expected 1 without max_new_tokens, where no text is generated, got {beams!r}")
    if engine_runtime not in RUNTIMES[1:]:
        raise InputError(f"engine_runtime: expected {' or '.join(RUNTIMES[1:])}, got {engine_runtime!r}")
    if engine_runtime == "openvino":
        require_openvino(task, model)
    runner = untuned(Runner(model, task, max_tokens=1, runtime=engine_runtime), max_tokens=max_tokens, threads=threads)
    labels, kind = task.label_names(model), task.output_kind(model)
    require_free_name(identity, labels, kind)
    named = isinstance(dataset, (str, Path))
    sources = find_sources(str(dataset)) if named else [Source("dataset", "dataset", 0, _rows(dataset, column))]

    def events() -> Iterator[Window]:
        for source in sources:
            chunks = source.read(column, identity)
            yield from windows(chunks, runner.task, model, len(labels), max_tokens=runner.max_tokens, on_long=on_long)

    try:
        for window in scored(events(), runner):
            if window.reasons:
                rows = record_batch(window, labels, schema_of(labels, identity, window))
                yield with_reasons(rows, window, identity)
    except ShardError as error:
        raise InputError(f"dataset: {error}") from error


def mapper(
    model: nn.Module, task: Task, *, column: str | Sequence[str] = "text", max_tokens: int = 4096
) -> Callable[[Any], dict[str, list[Any]]]:
    """Return a function for `datasets.map(mapper(...), batched=True)` that adds the result and its reason, as in `score`.

    It runs in this process, with torch's threads. A larger batch_size of the map gives less padding.

    Args:
        model: The model.
        task: A task with closed labels.
        column: As in `score`.
        max_tokens: Padded input tokens in a batch.

    Raises:
        InputError: As in `score`; from the function, if the map is without batched=True.
    """
    require_fit(task, model)
    require_input_columns(task, column_names(column))
    labels, kind = task.label_names(model), task.output_kind(model)
    runner, inputs = Runner(model, task, max_tokens), column_names(column)

    def score_batch(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        missing = [name for name in inputs if name not in batch]
        if missing:
            raise InputError(f"column: expected the column {missing[0]!r}, got {', '.join(map(repr, batch))}")
        if _is_row(batch, inputs[0]):
            raise InputError("mapper: expected a batch of rows, as datasets.map(..., batched=True) gives, got a single row")
        values = batch[inputs[0]] if len(inputs) == 1 else map(list, zip(*(batch[name] for name in inputs), strict=True))
        types = {"label": "string", "reason": "string"}
        names = (*output_names(labels, kind), "reason")
        columns: dict[str, list[Any]] = {name: _Typed(types.get(name) or result_type(name)) for name in names}
        with task.scoring(model), torch.inference_mode():
            rows = [Row(value) for value in values]
            for window in windows([(rows, 1.0)], runner.task, model, len(labels), max_tokens=max_tokens, on_long="cut"):
                for items in runner.batches(window):
                    runner.score(window, items)
                extended = with_reasons(record_batch(window, labels, schema_of(labels, None, window)), window)
                for name in columns:
                    columns[name] += extended.column(name).to_pylist()
        return columns

    return score_batch


class _Typed(list[Any]):
    """A column with an Arrow type. `datasets.map` takes the type from its first rows, which may all be null."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def __arrow_array__(self, type: Any = None) -> pyarrow.Array:
        import pyarrow

        return pyarrow.array(list(self), type or self.kind)


def _is_row(batch: Mapping[str, Any], column: str) -> bool:
    """Tell whether what `datasets` gives is one row. A pair of texts in it would look like a batch of two texts."""
    single = (str, int, float, type(None))
    values = batch.values() if isinstance(batch, dict) else [batch[column]]
    return type(batch).__name__ == "LazyRow" or any(isinstance(value, single) for value in values)


def _rows(dataset: Any, column: str | Sequence[str]) -> Iterator[Any]:
    """Rows as mappings; inputs become mappings with `column`, or with a column for each of their texts."""
    names = column_names(column)

    def as_mapping(row: Any) -> Any:
        if isinstance(row, Mapping):
            return row
        if len(names) == 1:
            return {names[0]: row}
        return dict(zip(names, row, strict=False)) if isinstance(row, (list, tuple)) else row

    return map(as_mapping, rows_in_memory(dataset, "dataset"))
