"""Options of the commands: their types, names and help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# The groups of options in a command's help.
DATA, SCORING, BUDGET = "Examples and task", "Scores", "Budget"
CHECKS, MACHINE, OUTPUT = "Recovery and timing", "Machine", "Output"

UnitOption = Annotated[
    str, typer.Option("--unit", help="The unit that is removed from attention: head or channel.", rich_help_panel=SCORING)
]
Device = Annotated[
    str, typer.Option(help="Device to run on: auto (a GPU if there is one), cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)
]
Threads = Annotated[
    int | None, typer.Option(help="Number of CPU threads; by default, torch decides.", min=1, rich_help_panel=MACHINE)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.", rich_help_panel=OUTPUT)
]
Model = Annotated[str, typer.Argument(help="A model folder, a Hub name, or 'builtin' (the built-in model).")]
Data = Annotated[
    str, typer.Option(help="Examples: a JSONL, CSV, Parquet or column file, a Hub name, or builtin:TASK.", rich_help_panel=DATA)
]
DataUnlessDry = Annotated[
    str | None, typer.Option("--data", help="Examples, as for attribute; not needed with --dry-run.", rich_help_panel=DATA)
]
Eval = Annotated[str | None, typer.Option("--eval", help="Held-out examples to evaluate on.", rich_help_panel=DATA)]
InputColumn = Annotated[
    str | None,
    typer.Option(
        "--input-column",
        help="Column of the input; several between commas are one input of several texts. In a column file of tokens and tags: "
        "the column of the tokens, a number from 1 (the default) or a name. By default, the column with a common name.",
        rich_help_panel=DATA,
    ),
]
TargetColumn = Annotated[
    str | None,
    typer.Option(
        "--target-column",
        help="Column of the target. In a column file: the column of the tags. By default, the column with a common name.",
        rich_help_panel=DATA,
    ),
]
PromptText = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        help="Text around each input, as in 'topic: {input}', or with names of columns in braces; by default, the one that the "
        "model's folder remembers.",
        rich_help_panel=DATA,
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Ask in the tokenizer's chat template, for instruction models.", rich_help_panel=DATA)
]
System = Annotated[
    str | None, typer.Option("--system", help="With --chat: the text of the system's message.", rich_help_panel=DATA)
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Kind of task: text-to-text, causal-lm, or sequence-, token- or image-classification; by default, the model's.",
        rich_help_panel=DATA,
    ),
]
Labels = Annotated[
    str,
    typer.Option(
        help="Candidate labels: between commas, a JSON list, or a file (.txt: a label a line; .json: a list); 'open': any "
        "target text; 'auto': from the data. For a causal-lm, spaces around a label are part of it.",
        rich_help_panel=DATA,
    ),
]
Select = Annotated[
    str | None,
    typer.Option("--sites", help="Sites to prune: 'ffn', 'encoder.attention', 'decoder.ffn.0-3', ...", rich_help_panel=SCORING),
]
CriterionName = Annotated[
    str,
    typer.Option(
        "--criterion",
        help="How to score units: a name from `secateur criteria`, with settings after a colon, as in ig:tolerance=0.01.",
        rich_help_panel=SCORING,
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Quantity that scores explain: probability, log_probability or margin; by default, the criterion's.",
        rich_help_panel=SCORING,
    ),
]
Over = Annotated[
    str | None,
    typer.Option(
        "--over-examples",
        help="How scores are summed over examples: signed, absolute or squared; by default, the criterion's.",
        rich_help_panel=SCORING,
    ),
]
Unlabeled = Annotated[
    bool,
    typer.Option(
        "--unlabeled",
        help="Score for all candidate labels. Examples then need no targets, but --labels is required.",
        rich_help_panel=SCORING,
    ),
]
MOST_SEED = 2**32 - 1  # NumPy takes no larger one.
MOST_RATE = 1e6  # Also refuses infinity.
Limit = Annotated[
    int | None,
    typer.Option("--examples", help="Use only the first N examples; by default, all of them.", min=1, rich_help_panel=DATA),
]
MaxTokens = Annotated[
    int, typer.Option(help="Largest number of input tokens in a batch, padding included.", min=1, rich_help_panel=MACHINE)
]
PassTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        help="Largest number of input tokens in a batch, padding included; by default 4096, but on a GPU scores take what its "
        "memory holds.",
        min=1,
        rich_help_panel=MACHINE,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Cut inputs to N tokens; by default, to the tokenizer's maximum.", min=2, rich_help_panel=DATA),
]
Align = Annotated[
    str,
    typer.Option(help="FFN widths become multiples of this number; 'auto' chooses it for the device.", rich_help_panel=BUDGET),
]
ShapeName = Annotated[
    str,
    typer.Option(
        "--shape",
        help="What an engine can load: any; per-layer (attention whole or absent); uniform (layers alike); stock (no code "
        "needed: layers alike, whole blocks removed).",
        rich_help_panel=BUDGET,
    ),
]
Keep = Annotated[float | None, typer.Option(help="Budget: share of units to keep at every site.", rich_help_panel=BUDGET)]
Flops = Annotated[
    float | None, typer.Option(help="Budget: share of the layers' FLOPs that may remain.", rich_help_panel=BUDGET)
]
Params = Annotated[
    float | None, typer.Option(help="Budget: share of the layers' parameters that may remain.", rich_help_panel=BUDGET)
]
Memory = Annotated[
    float | None,
    typer.Option(help="Budget: share of the model's weights, embeddings included, that may remain.", rich_help_panel=BUDGET),
]
Speedup = Annotated[
    float | None,
    typer.Option(help="Budget: speed-up over the dense model, measured at the largest shape.", rich_help_panel=BUDGET),
]
Latency = Annotated[
    float | None,
    typer.Option(help="Budget: milliseconds of a forward pass, measured at the largest shape.", rich_help_panel=BUDGET),
]
AllocationName = Annotated[
    str,
    typer.Option(
        "--allocation",
        help="How to spread a budget over sites: uniform, global or knapsack; for prune also auto, which tries them.",
        rich_help_panel=BUDGET,
    ),
]
Floor = Annotated[float | None, typer.Option(help="Smallest share of its units that a site may keep.", rich_help_panel=BUDGET)]
PerHead = Annotated[
    bool, typer.Option(help="Rank channels within each head, so that all heads keep the same width.", rich_help_panel=BUDGET)
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread the model over several devices with Accelerate: auto, balanced, balanced_low_0 or sequential.",
        rich_help_panel=MACHINE,
    ),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Folder for partial sums, which --resume continues from after a kill. It is removed at the end.",
        rich_help_panel=SCORING,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Dtype to compute in: float32, float16, bfloat16; auto: the stored one on a GPU, float32 on a CPU.",
        rich_help_panel=MACHINE,
    ),
]
Recover = Annotated[
    str,
    typer.Option(
        help="How to refit the out-projections: least-squares, scale, bias or none; for prune also auto, which tries them.",
        rich_help_panel=CHECKS,
    ),
]
MOST_LAYERS = 1000  # More than any model has; a typing error must not take all memory.
Sizes = Annotated[str, typer.Option(help="Batch sizes to time, separated by commas.", rich_help_panel=CHECKS)]
Lengths = Annotated[
    str,
    typer.Option(help="Input lengths to time, in tokens, a prompt's among them, separated by commas.", rich_help_panel=CHECKS),
]
Out = Annotated[Path, typer.Option(help="Output path; it must not exist yet, but with --overwrite.", rich_help_panel=OUTPUT)]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue what an earlier run with the same settings has begun.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an existing output that secateur wrote. It stays as it is until the new one is complete.",
        rich_help_panel=OUTPUT,
    ),
]
Push = Annotated[
    str | None,
    typer.Option(
        help="Upload the finished folder to this repository of the Hugging Face Hub, OWNER/NAME, which is created if needed.",
        rich_help_panel=OUTPUT,
    ),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private",
        help="With --push: create a private repository; refuse a public one that exists.",
        rich_help_panel=OUTPUT,
    ),
]
OutUnlessDry = Annotated[
    Path | None,
    typer.Option("--out", help="Output path; it must not exist yet. Not needed with --dry-run.", rich_help_panel=OUTPUT),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the pruned model's sizes, FLOPs and memory from the config alone, without weights or data.",
        rich_help_panel=OUTPUT,
    ),
]
ScoresOption = Annotated[
    Path | None,
    typer.Option(
        "--scores",
        help="With --dry-run: a file of scores from attribute, for allocations that need scores.",
        rich_help_panel=OUTPUT,
    ),
]
RunFolder = Annotated[
    Path,
    typer.Option(
        help="Folder of the run, which fills it step by step, so that --resume can continue. Hence there is no --overwrite: "
        "delete a former run yourself.",
        rich_help_panel=OUTPUT,
    ),
]
KeepLayers = Annotated[int, typer.Option(help="Number of layers to keep, in all stacks together.", rich_help_panel=BUDGET)]
LayerUnitOption = Annotated[
    str,
    typer.Option(
        "--unit",
        help="What counts as a layer: block, or branch (self-attention, cross-attention or FFN).",
        rich_help_panel=SCORING,
    ),
]
