"""`secateur layer-gates`: learn with gates which layers a task needs, delete the others, and verify the result."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.table import Table

from secateur.cli.commands.layers import layers_making
from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import (
    MOST_RATE,
    MOST_SEED,
    Chat,
    Data,
    Device,
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
    PromptText,
    RunFolder,
    Sizes,
    System,
    TargetColumn,
    Threads,
)
from secateur.cli.shared.plots import gates_plot
from secateur.cli.shared.unused import require_unused
from secateur.data.examples import Example
from secateur.flow.folder import round_weights_, write_folder
from secateur.flow.loaded import Loaded, meta_model
from secateur.flow.usage import usage_of
from secateur.measuring.compare import compare
from secateur.measuring.plots import machine, model_name
from secateur.measuring.synthetic import require_lengths
from secateur.model.blocks import LayerUnit
from secateur.model.discovery import config_digest
from secateur.model.offloading import weights_digest
from secateur.model.ordinary import require_writable
from secateur.pruning.verify import Verification, some_batches, verify_layers
from secateur.support.errors import VerificationError
from secateur.support.fields import MOST_STEPS
from secateur.support.files import require_run_folder
from secateur.support.ledger import ROWS, Ledger, content_hash
from secateur.tasks import Task
from secateur.tasks.fitting import reader_digest

if TYPE_CHECKING:
    from secateur.learned.layers.layer_gates import LayerGates

_RATE = 3e-5  # The default learning rate of the weights.
# The results of a run, with their types.
RESULTS = {
    "settings": dict[str, Any], "deleted": list[str], "closed at the end": list[str], "z": dict[str, float],
    "training": dict[str, Any], "verification": dict[str, Any], "parameters": dict[str, int],
    "evaluation": dict[str, Any] | None, "benchmark": dict[str, Any],
}  # fmt: skip


@output.resumes
def layer_gates(
    model: Model,
    data: Data,
    out: RunFolder,
    keep_layers: KeepLayers,
    unit: LayerUnitOption = "block",
    steps: Annotated[int, typer.Option(help="Number of training steps.", min=1, max=MOST_STEPS)] = 500,
    strength: Annotated[float, typer.Option(help="Weight of the penalty on open gates in the loss (lambda_0).")] = 5.0,
    warmup: Annotated[float, typer.Option(help="Share of the steps that pass before the penalty counts.")] = 0.25,
    drop: Annotated[float, typer.Option(help="Probability that a step leaves a block out (LayerDrop).")] = 0.0,
    frozen: Annotated[bool, typer.Option("--frozen/--fine-tune", help="Train only the gates, or also the weights.")] = False,
    batch_size: Annotated[int, typer.Option(help="Examples in a training step.", min=1)] = 32,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the weights (AdamW).", min=0, max=MOST_RATE)] = _RATE,
    gate_learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the gates (projected SGD).", min=0, max=MOST_RATE)
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of dropout and of the order of examples.", min=0, max=MOST_SEED)] = 0,
    evaluation: Eval = None,
    kind: Kind = None,
    labels: Labels = "auto",
    input_column: InputColumn = None,
    target_column: TargetColumn = None,
    prompt: PromptText = None,
    chat: Chat = False,
    system: System = None,
    examples: Limit = None,
    max_length: MaxLength = None,
    batch_sizes: Sizes = "1,32",
    lengths: Lengths = "64",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Learn with gates which layers a task needs, delete the others, verify, evaluate and benchmark, as a resumable run."""
    from secateur.learned.layers.layer_gates import LayerGates
    from secateur.learned.layers.layer_training import task_features, train
    from secateur.support.trainer import trainer_arguments

    inputs.use_threads(threads)
    if frozen:
        require_unused("with --frozen", learning_rate=(learning_rate, _RATE))
    require_run_folder(out)
    (layer_unit,) = inputs.among("unit", unit, get_args(LayerUnit))
    shapes = inputs.shapes(batch_sizes, lengths)
    # The model is trained in float32 whatever its stored dtype, because the changes of a step get lost in half precision.
    options = inputs.data_options(input_column, target_column, (prompt, chat, system), labels)
    loaded, task, rows = inputs.prepare(
        model, data, options, task=kind, examples=examples, max_length=max_length, device=device, dtype="float32"
    )
    require_writable(loaded.model)
    require_lengths(loaded.model, shapes[1])
    held_out = None if evaluation is None else inputs.read(evaluation, loaded, options)
    given = {
        "max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "save_steps": max(1, steps // 4), "logging_steps": max(1, steps // 50),
    }  # fmt: skip
    arguments = trainer_arguments(out / "checkpoints", loaded.device, given)
    gates = LayerGates(
        copy.deepcopy(loaded.model), keep_layers=keep_layers, unit=cast(LayerUnit, layer_unit), strength=strength,
        warmup=warmup, drop=drop, frozen=frozen,
    )  # fmt: skip
    # Examples are checked before the folder is begun, so that unusable examples leave no folder behind.
    features = task_features(task, gates, rows)
    if held_out is not None:
        task.items(loaded.model, held_out)
    learned = {**gates.settings(), "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    learned["gate_learning_rate"] = gate_learning_rate
    settings = {
        "model": model, "data": [data, len(rows)], "eval": evaluation, "task": loaded.task, "labels": task.labels,
        "max_length": max_length, "columns": [input_column, target_column], "prompt": [prompt, chat, system], **learned,
        # Another model, tokenizer or data under the same names would give other gates.
        "tokenizer": reader_digest(loaded.tokenizer), "config": config_digest(loaded.model),
        "weights": weights_digest(loaded.model), ROWS: content_hash([rows, held_out]),
    }  # fmt: skip
    with gates, Ledger(out, settings, RESULTS) as ledger:
        cell = {"model": model}
        if cell not in ledger:
            log = train(
                gates, features[0], arguments, collate=features[1], learning_rates={"gates": gate_learning_rate}, resume=True,
                progress=bars(),
            )  # fmt: skip
            ledger.add(cell, _write_selected(loaded, gates, task, log, out / "model", learned, rows, held_out, shapes))
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        (document,) = ledger.rows()
    if document["closed at the end"]:
        closed = ", ".join(document["closed at the end"])
        output.say(
            f"{closed}: still open after the training, closed as the smallest; more steps or a larger strength do better"
        )
    folder = out / "model"  # It may stem from an earlier process, so its config tells the model.
    usage = usage_of(meta_model(str(folder), task=loaded.task), task, folder)
    output.emit({"out": str(out), **document}, as_json, *_shown(document), f"written to {folder}", *usage.lines())


def _write_selected(
    loaded: Loaded,
    gates: LayerGates,
    task: Task,
    log: Sequence[Mapping[str, Any]],
    out: Path,
    learned: Mapping[str, Any],
    rows: Sequence[Example],
    held_out: Sequence[Example] | None,
    shapes: tuple[Sequence[int], Sequence[int]],
) -> dict[str, Any]:
    """Close the smallest gates beyond the number of layers to keep, delete the closed layers, verify the result against the
    gated model, and write the folder. Returns the report. Raises VerificationError if the two models differ."""
    late = gates.close_smallest_()
    gone = [name for name in gates.names if name not in gates.left]
    output.say("deleting and verifying")
    selected = gates.export()
    gates.detach()
    batches = some_batches(gates.model, task, rows)
    verification = verify_layers(gates.model, selected, gone, task, batches, scales={n: gates.values[n] for n in gates.left})
    if not verification.holds:
        raise VerificationError(f"nothing was written: {verification}")
    round_weights_(selected, loaded.stored)  # Evaluate the weights as they are written.
    comparison = compare(loaded.model, selected, task, held_out, *shapes, say=output.say, progress=bars())
    course = [row for row in log if "loss" in row]
    document = {
        "settings": learned, "deleted": gone, "closed at the end": late, "z": gates.values,
        "training": {
            "step": [row["step"] for row in course], "loss": [row["loss"] for row in course],
            "z": {name: [row[f"z/{name}"] for row in course] for name in gates.names},
        },
        "verification": verification.to_json(), **comparison.to_json(),
    }  # fmt: skip
    if not out.exists():
        write_folder(
            selected, out, task=task, task_name=loaded.task, tokenizer=loaded.tokenizer, stored=loaded.stored,
            document=document, comparison=comparison, making=layers_making(learned["unit"], gone, gates.names),
            files={"gates.png": _gates_plot(document, loaded, len(rows))},
        )  # fmt: skip
    return document


def _gates_plot(document: Mapping[str, Any], loaded: Loaded, examples: int) -> bytes:
    """The plot of the gates over the training."""
    environment = document["benchmark"]["environment"]
    about = f"(n = {examples}, {environment['device']})"
    title = f"{model_name(loaded.model)}, {loaded.task}: gates of layers over the training {about}"
    return gates_plot(
        document["training"], title, f"One training run on {examples} examples; no error bars. {machine(environment)}."
    )


def _shown(document: Mapping[str, Any]) -> list[Table | str]:
    """The report as tables: the gate of each layer, and the sizes, metrics and times of both models; then the verification."""
    gate_of = {name: "deleted" if name in document["deleted"] else f"{value:.3f}" for name, value in document["z"].items()}
    sizes = document["parameters"]
    rows = [("parameters", f"{sizes['dense']:,}", f"{sizes['pruned']:,} ({sizes['pruned'] / sizes['dense']:.0%})")]
    if document["evaluation"]:
        dense, pruned = (document["evaluation"][name] for name in ("dense", "pruned"))
        rows.insert(0, (dense["metric"], f"{dense['value']:.4f}", f"{pruned['value']:.4f}"))
    rows += [
        (f"ms, {timing['batch_size']} x {timing['length']}", f"{timing['dense_ms']:.1f}", f"{timing['pruned_ms']:.1f}")
        for timing in document["benchmark"]["timings"]
    ]
    proof = Verification(**{name: value for name, value in document["verification"].items() if name != "holds"})
    return [output.table(("layer", "gate"), gate_of.items()), output.side_by_side(rows), str(proof)]
