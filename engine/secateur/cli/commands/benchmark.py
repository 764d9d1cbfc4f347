"""`secateur benchmark`: time a dense against a pruned model over batch shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import secateur
from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import (
    Device,
    Dtype,
    Json,
    Kind,
    Lengths,
    Sizes,
    Threads,
)
from secateur.flow.loaded import load_model
from secateur.measuring.benchmark import MOST_PAIRS
from secateur.measuring.plots import benchmark_plot
from secateur.measuring.synthetic import MOST, synthetic_batches
from secateur.support.files import new_folder


@output.claims_out()
def benchmark(
    dense: Annotated[str, typer.Argument(help="The dense model: a folder, a Hub name, or 'builtin'.")],
    pruned: Annotated[str, typer.Argument(help="The pruned model: a folder or a Hub name.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the report and the plot; it must not exist yet. By default, nothing is written."),
    ] = None,
    batch_sizes: Sizes = "1,8,32",
    lengths: Lengths = "16,64",
    target_length: Annotated[
        int, typer.Option(help="Decoder tokens, for a model with an encoder and a decoder.", min=1, max=MOST["lengths"])
    ] = 8,
    pairs: Annotated[
        int,
        typer.Option(help="Number of dense runs, and of pruned runs in turn with them, for each shape.", min=3, max=MOST_PAIRS),
    ] = 20,
    kind: Kind = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time a dense against a pruned model: latency, throughput, and speed-ups with their spread, over batch shapes."""
    inputs.use_threads(threads)
    sizes, tokens = inputs.shapes(batch_sizes, lengths)
    first = load_model(dense, task=kind, device=device, dtype=dtype)
    second = load_model(pruned, task=kind or first.task, device=device, dtype=dtype)
    batches = synthetic_batches(first.model, sizes, tokens, target_length=target_length)
    report = secateur.benchmark(first.model, second.model, batches, pairs=pairs, progress=bars())
    if out is not None:
        with new_folder(out) as folder:
            (folder / "benchmark.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
            (folder / "benchmark.png").write_bytes(benchmark_plot(report, f"{dense} against {pruned}, {first.task}"))
    output.emit(report.to_json(), as_json, output.timings_table(report), *report.notes)
