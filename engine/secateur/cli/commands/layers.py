"""`secateur layers`: score whole layers, delete those with the lowest scores, and verify the result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.table import Table

from secateur.attribution.layer_scores import LAYER_CRITERIA, choose_layers, layer_scores
from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import (
    Chat,
    Data,
    Device,
    Dtype,
    Eval,
    InputColumn,
    Json,
    KeepLayers,
    Kind,
    Labels,
    LayerUnitOption,
    Lengths,
    Limit,
    MaxLength,
    Model,
    Out,
    PassTokens,
    PromptText,
    Sizes,
    System,
    TargetColumn,
    Threads,
)
from secateur.data.examples import Example
from secateur.flow.folder import write_folder
from secateur.flow.loaded import Loaded
from secateur.flow.model_card import Making, Removed, making_now
from secateur.flow.usage import usage_of
from secateur.measuring.compare import compare
from secateur.measuring.synthetic import require_lengths
from secateur.model.blocks import LayerUnit
from secateur.model.blocks import layers as layers_of
from secateur.model.ordinary import require_writable
from secateur.pruning.delete_layers import delete_layers
from secateur.pruning.verify import some_batches, verify_layers
from secateur.support.errors import VerificationError
from secateur.tasks import Target, Task


@output.claims_out()
def layers(
    model: Model,
    data: Data,
    out: Out,
    keep_layers: KeepLayers,
    criterion: Annotated[str, typer.Option(help=f"How to score layers: {', '.join(LAYER_CRITERIA)}.")] = "influence",
    unit: LayerUnitOption = "block",
    target: Annotated[
        str, typer.Option(help="Quantity that scores explain: probability, log_probability or margin.")
    ] = "log_probability",
    evaluation: Eval = None,
    kind: Kind = None,
    labels: Labels = "auto",
    input_column: InputColumn = None,
    target_column: TargetColumn = None,
    prompt: PromptText = None,
    chat: Chat = False,
    system: System = None,
    examples: Limit = None,
    max_tokens: PassTokens = None,
    max_length: MaxLength = None,
    batch_sizes: Sizes = "1,32",
    lengths: Lengths = "64",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score whole layers, delete the lowest-scored ones, verify, evaluate and benchmark; write a model folder with a report."""
    inputs.use_threads(threads)
    (criterion_name,) = inputs.among("criterion", criterion, LAYER_CRITERIA)
    (layer_unit,) = inputs.among("unit", unit, get_args(LayerUnit))
    (target_name,) = inputs.among("target", target, get_args(Target))
    shapes = inputs.shapes(batch_sizes, lengths)
    options = inputs.data_options(input_column, target_column, (prompt, chat, system), labels)
    loaded, task, rows = inputs.prepare(
        model, data, options, task=kind, examples=examples, max_length=max_length, device=device, dtype=dtype
    )
    held_out = None if evaluation is None else inputs.read(evaluation, loaded, options)
    # Refuse a wrong number of layers before the scoring, which takes long.
    require_writable(loaded.model)
    require_lengths(loaded.model, shapes[1])
    choose_layers(dict.fromkeys(layers_of(loaded.model, cast(LayerUnit, layer_unit)), 0.0), keep_layers)
    scores = layer_scores(
        loaded.model, task, rows, criterion_name, unit=cast(LayerUnit, layer_unit), target=cast(Target, target_name),
        max_tokens=max_tokens, progress=bars(),
    )  # fmt: skip
    gone = choose_layers(scores, keep_layers)
    chosen = {"criterion": criterion_name, "unit": layer_unit, "keep_layers": keep_layers, "scores": scores, "deleted": gone}
    document, shown = write_deleted(loaded, task, chosen, out, rows=rows, held_out=held_out, shapes=shapes)
    output.emit(document, as_json, scores_table(scores, gone), *shown)


def write_deleted(
    loaded: Loaded,
    task: Task,
    chosen: Mapping[str, Any],
    out: Path,
    *,
    rows: Sequence[Example],
    held_out: Sequence[Example] | None,
    shapes: tuple[Sequence[int], Sequence[int]],
) -> tuple[dict[str, Any], list[Table | str]]:
    """Delete layers, verify the result, evaluate and time it, and write the folder.

    The folder holds the model in its stored dtype, its tokenizer, report.json, a plot and a model card.

    Args:
        loaded: The dense model.
        task: Its task.
        chosen: The first part of the report. Its "deleted" names the layers to delete.
        out: The folder.
        rows: Examples to verify on.
        held_out: Examples to evaluate on; None to evaluate nothing.
        shapes: Batch sizes and lengths to time.

    Returns:
        The report, and the tables and lines to print.

    Raises:
        VerificationError: The smaller model does not compute what the dense one computes without these layers.
    """
    model, gone = loaded.model, chosen["deleted"]
    output.say("deleting and verifying")
    deleted = delete_layers(model, gone)
    verification = verify_layers(model, deleted, gone, task, some_batches(model, task, rows))
    if not verification.holds:
        raise VerificationError(f"nothing was written: {verification}")
    comparison = compare(model, deleted, task, held_out, *shapes, say=output.say, progress=bars())
    document = {**chosen, "verification": verification.to_json(), **comparison.to_json(), "out": str(out)}
    write_folder(
        deleted, out, task=task, task_name=loaded.task, tokenizer=loaded.tokenizer, stored=loaded.stored, document=document,
        comparison=comparison, files={},
        making=layers_making(chosen["unit"], chosen["deleted"], chosen["scores"]),
    )  # fmt: skip
    usage = usage_of(deleted, task, out, named=bool(loaded.task))
    return document, [*output.compared(comparison), str(verification), f"written to {out}", *usage.lines()]


def layers_making(unit: str, deleted: Collection[str], names: Collection[str]) -> Making:
    """Return how a model lost whole layers, for its card.

    Args:
        unit: What counts as a layer: "block" or "branch".
        deleted: The names of the deleted layers.
        names: The names of all layers.
    """
    what = "blocks" if unit == "block" else "branches"
    budget = f"{len(names) - len(deleted)} of {len(names)} {what}; deleted: {', '.join(deleted)}"
    removed = [Removed(what, len(names), len(names) - len(deleted))]
    return making_now(removed, budget)


def scores_table(scores: Mapping[str, float], gone: Collection[str]) -> Table:
    """Return a table of the layers, their scores, and whether they are deleted."""
    rows = ((name, f"{score:.4g}", "deleted" if name in gone else "") for name, score in scores.items())
    return output.table(("layer", "score", ""), rows)
