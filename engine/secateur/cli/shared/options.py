"""Options of the commands: their types, names and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

UnitOption = Annotated[str, typer.Option("--unit", help="What is removed from attention: head or channel.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")]
Model = Annotated[str, typer.Argument(help="Model folder, Hub name, or 'builtin'.")]
Data = Annotated[str, typer.Option(help="Examples: JSONL, CSV, Parquet or column file, Hub name, or builtin:TASK.")]
DataUnlessDry = Annotated[str | None, typer.Option("--data", help="Examples, as for attribute; --dry-run needs none.")]
Eval = Annotated[str | None, typer.Option("--eval", help="Held-out examples to evaluate on.")]
Column = Annotated[
    str | None,
    typer.Option(help="Examples are in CoNLL-style column files, tags in this column: a number, or a name of global.columns."),
]
TokenColumn = Annotated[str, typer.Option(help="Of a column file's tokens, as --column.")]
Kind = Annotated[
    str | None,
    typer.Option("--task", help="text-to-text, causal-lm, or sequence-, token- or image-classification."),
]
Labels = Annotated[str, typer.Option(help="Candidate labels between commas; 'open' for open targets; 'auto' from the data.")]
Select = Annotated[
    str | None, typer.Option("--sites", help="Sites to prune: 'ffn', 'encoder.attention', 'decoder.ffn.0-3', ...")
]
CriterionName = Annotated[
    str,
    typer.Option(
        "--criterion",
        help="How units are scored: a name that `secateur criteria` lists; settings after a colon: ig:tolerance=0.01.",
    ),
]
TargetName = Annotated[str | None, typer.Option("--target", help="probability, log_probability or margin.")]
Over = Annotated[str | None, typer.Option("--over-examples", help="signed, absolute or squared.")]
Unlabeled = Annotated[
    bool, typer.Option("--unlabeled", help="Score for all candidate labels: examples need no targets, but --labels.")
]
Limit = Annotated[int | None, typer.Option("--examples", help="Use the first that many examples to score.", min=1)]
MaxTokens = Annotated[int, typer.Option(help="Padded input tokens in a batch.", min=1)]
MaxLength = Annotated[int | None, typer.Option(help="Cut inputs after that many tokens.", min=2)]
Align = Annotated[str, typer.Option(help="FFN widths are multiples of it: a number, or 'auto' by device.")]
Keep = Annotated[float | None, typer.Option(help="Share of units that stays at every site.")]
Flops = Annotated[float | None, typer.Option(help="Share of the layers' FLOPs that may remain.")]
Params = Annotated[float | None, typer.Option(help="Share of the layers' parameters that may remain.")]
Memory = Annotated[float | None, typer.Option(help="Share of all the model's weights, embeddings included, that may remain.")]
Speedup = Annotated[float | None, typer.Option(help="How much faster than the dense model, measured at the largest shape.")]
Latency = Annotated[float | None, typer.Option(help="Milliseconds of a forward pass, measured at the largest shape.")]
AllocationName = Annotated[
    str, typer.Option("--allocation", help="How a budget is spread over sites: uniform, global, knapsack; prune tries: auto.")
]
Floor = Annotated[float | None, typer.Option(help="Share of its units that every site keeps at least.")]
PerHead = Annotated[bool, typer.Option(help="Rank channels within each head, so that heads stay alike.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Spread a model over several devices (Accelerate): auto, balanced, balanced_low_0 or sequential."),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="Folder for partial sums: the same command goes on after a kill. Gone at the end."),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Recover = Annotated[
    str, typer.Option(help="Refit the out-projections: least-squares, scale, bias (alone) or none; prune tries: auto.")
]
Sizes = Annotated[str, typer.Option(help="Batch sizes between commas.")]
Lengths = Annotated[str, typer.Option(help="Input lengths in tokens, between commas.")]
Out = Annotated[Path, typer.Option(help="Output; must not exist yet.")]
OutUnlessDry = Annotated[Path | None, typer.Option("--out", help="Output; must not exist yet; --dry-run writes none.")]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Tell sizes, FLOPs and memory of such a model from its config alone: no weights, no data."),
]
ScoresOption = Annotated[
    Path | None, typer.Option("--scores", help="With --dry-run: scores that attribute wrote, for budgets spread by them.")
]
RunFolder = Annotated[Path, typer.Option(help="Folder of the run. One that was begun with the same settings goes on.")]
KeepLayers = Annotated[int, typer.Option(help="How many layers stay, in all stacks together.")]
LayerUnitOption = Annotated[
    str, typer.Option("--unit", help="What a layer is: block, or branch (self-attention, cross-attention, FFN).")
]
