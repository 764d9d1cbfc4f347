"""`secateur evaluate`: measure a model's metric on examples."""

from __future__ import annotations

import secateur
from secateur.cli.shared import inputs, output
from secateur.cli.shared.options import (
    Column,
    Data,
    Device,
    Dtype,
    Json,
    Kind,
    Labels,
    Limit,
    MaxLength,
    MaxTokens,
    Model,
    Threads,
    TokenColumn,
)


def evaluate(
    model: Model,
    data: Data,
    kind: Kind = None,
    labels: Labels = "auto",
    column: Column = None,
    token_column: TokenColumn = "1",
    examples: Limit = None,
    max_tokens: MaxTokens = 8192,
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure a model's accuracy, exact match, entity F1 or perplexity on examples, with its 95% interval."""
    inputs.use_threads(threads)
    loaded, task, rows = inputs.prepare(
        model, data, task=kind, labels=labels, examples=examples, max_length=max_length, device=device, dtype=dtype,
        columns=(column, token_column),
    )  # fmt: skip
    result = secateur.evaluate(loaded.model, task, rows, max_tokens=max_tokens)
    output.emit({"model": model, **result.to_json()}, as_json, str(result))
