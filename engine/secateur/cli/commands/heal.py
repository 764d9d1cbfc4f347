"""`secateur heal`: train a pruned folder against the dense model that it was made from, and write a new folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

import secateur
from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import (
    MOST_RATE,
    MOST_SEED,
    OUTPUT,
    Chat,
    Data,
    Device,
    Dtype,
    Eval,
    InputColumn,
    Json,
    Kind,
    Labels,
    Lengths,
    Limit,
    MaxLength,
    MaxTokens,
    Out,
    PromptText,
    Resume,
    Sizes,
    System,
    TargetColumn,
    Threads,
)
from secateur.cli.shared.unused import require_unused
from secateur.flow.folder import round_weights_, write_folder
from secateur.flow.model_card import making_now, removed_by
from secateur.flow.pruned_folder import dense_name, load_teacher, plan_files, plan_in, removed_in
from secateur.flow.usage import usage_of
from secateur.healing.settings import Targets
from secateur.measuring.compare import compare
from secateur.measuring.synthetic import require_lengths
from secateur.model.blocks import blocks
from secateur.model.ordinary import require_writable
from secateur.support.ledger import require_not_begun

TRAINING = "Training"


@output.claims_out()
def heal(
    model: Annotated[str, typer.Argument(help="The folder of a pruned model.")],
    data: Data,
    out: Out,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The dense model that the folder was made from; by default, the one that the folder names.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Wall-clock minutes, evaluations included.", rich_help_panel=TRAINING)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the examples, in place of --minutes; 5 without either.", rich_help_panel=TRAINING),
    ] = None,
    targets: Annotated[
        str,
        typer.Option(
            help="Where targets come from: labels (the examples'), all (all candidate labels), teacher (its own answers). "
            "Examples need no targets for the last two.",
            rich_help_panel=TRAINING,
        ),
    ] = "labels",
    blockwise: Annotated[
        bool,
        typer.Option(
            "--blockwise/--no-blockwise", help="First train each block that lost units alone.", rich_help_panel=TRAINING
        ),
    ] = True,
    hidden_weight: Annotated[
        float,
        typer.Option(help="Weight of the states behind blocks in the loss.", min=0, max=MOST_RATE, rich_help_panel=TRAINING),
    ] = 0.0,
    lora: Annotated[
        int | None,
        typer.Option(
            help="Train adapters of this rank (LoRA) in place of all weights, and merge them.", min=1, rich_help_panel=TRAINING
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="Highest learning rate (AdamW).", min=0, max=MOST_RATE, rich_help_panel=TRAINING)
    ] = 5e-4,
    batch_size: Annotated[int, typer.Option(help="Examples in a training step.", min=1, rich_help_panel=TRAINING)] = 16,
    patience: Annotated[
        int,
        typer.Option(help="End after this many evaluations without a better one.", min=1, rich_help_panel=TRAINING),
    ] = 5,
    seed: Annotated[
        int,
        typer.Option(help="Seed of the order of examples.", min=0, max=MOST_SEED, rich_help_panel=TRAINING),
    ] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of checkpoints, which --resume continues from after a kill. It is removed at the end.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    evaluation: Eval = None,
    kind: Kind = None,
    labels: Labels = "auto",
    input_column: InputColumn = None,
    target_column: TargetColumn = None,
    prompt: PromptText = None,
    chat: Chat = False,
    system: System = None,
    examples: Limit = None,
    max_tokens: MaxTokens = 4096,
    max_length: MaxLength = None,
    batch_sizes: Sizes = "1,32",
    lengths: Lengths = "64",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a pruned folder against the dense model that it was made from (distillation); write a new folder."""
    inputs.use_threads(threads)
    if checkpoint is None:
        require_unused("without --checkpoint", resume=(resume, False))
    elif not resume:
        require_not_begun(checkpoint, "checkpoint")
    (chosen,) = inputs.among("targets", targets, get_args(Targets))
    shapes = inputs.shapes(batch_sizes, lengths)
    options = inputs.data_options(input_column, target_column, (prompt, chat, system), labels, chosen != "labels")
    loaded, task, rows = inputs.prepare(
        model, data, options, task=kind, examples=examples, max_length=max_length, device=device, dtype=dtype
    )
    require_writable(loaded.model)
    require_lengths(loaded.model, shapes[1])
    held_out = None if evaluation is None else inputs.read(evaluation, loaded, replace(options, unlabeled=False))
    plan = plan_in(model)
    dense = load_teacher(teacher or dense_name(model), loaded, device=device, dtype=dtype)
    healed = secateur.heal(
        loaded.model, dense, task, rows, targets=cast(Targets, chosen), epochs=epochs, minutes=minutes, blockwise=blockwise,
        hidden_weight=hidden_weight, lora=lora, learning_rate=learning_rate, batch_size=batch_size, patience=patience,
        seed=seed, removed_blocks=removed_in(model, loaded.model, dense), max_tokens=max_tokens,
        checkpoints=checkpoint, progress=bars(),
    )  # fmt: skip
    round_weights_(healed.model, loaded.stored)  # Evaluate the weights as they are written.
    start = None if held_out is None else secateur.evaluate(loaded.model, task, held_out, progress=bars())
    comparison = compare(dense, healed.model, task, held_out, *shapes, say=output.say, progress=bars())
    document: dict[str, Any] = {
        "healing": healed.to_json(), **({} if start is None else {"before": start.to_json()}), **comparison.to_json(),
        "out": str(out),
    }  # fmt: skip
    files = {} if plan is None else plan_files(plan, healed.model, loaded.task)
    removed = [] if plan is None else removed_by(plan, len(blocks(healed.model)))
    write_folder(
        healed.model, out, task=task, task_name=loaded.task, tokenizer=loaded.tokenizer, stored=loaded.stored,
        document=document, comparison=comparison, files=files,
        making=making_now(removed, "" if plan is None or plan.budget is None else str(plan.budget)),
    )  # fmt: skip
    if checkpoint is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
    shown = [*output.compared(comparison), *([] if start is None else [f"before healing: {start}"]), *healed.lines()]
    output.emit(document, as_json, *shown, f"written to {out}", *usage_of(healed.model, task, out).lines())
