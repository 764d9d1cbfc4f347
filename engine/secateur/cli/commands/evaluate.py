"""`secateur evaluate`: measure a model's metric on examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import secateur
from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import (
    OUTPUT,
    Chat,
    Data,
    Device,
    Dtype,
    InputColumn,
    Json,
    Kind,
    Labels,
    Limit,
    MaxLength,
    MaxTokens,
    Model,
    PromptText,
    System,
    TargetColumn,
    Threads,
)
from secateur.support.tables import require_writable_table, write_table


def evaluate(
    model: Model,
    data: Data,
    kind: Kind = None,
    labels: Labels = "auto",
    input_column: InputColumn = None,
    target_column: TargetColumn = None,
    prompt: PromptText = None,
    chat: Chat = False,
    system: System = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="File for each example's prediction and probabilities: .jsonl, .csv or .parquet; it must not exist yet.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
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
    if predictions is not None:
        require_writable_table(predictions)
    options = inputs.data_options(input_column, target_column, (prompt, chat, system), labels)
    loaded, task, rows = inputs.prepare(
        model, data, options, task=kind, examples=examples, max_length=max_length, device=device, dtype=dtype
    )
    result = secateur.evaluate(loaded.model, task, rows, max_tokens=max_tokens, progress=bars())
    lines = [str(result)]
    if predictions is not None:
        write_table(predictions, secateur.predict(loaded.model, task, rows, max_tokens=max_tokens, progress=bars()))
        lines.append(f"predictions written to {predictions}")
    output.emit({"model": model, **result.to_json()}, as_json, *lines)
