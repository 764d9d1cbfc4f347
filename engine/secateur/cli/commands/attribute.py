"""`secateur attribute`: score units and write the scores as safetensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, cast

import typer

import secateur
from secateur.attribution.checkpoint import Checkpoint
from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import (
    Chat,
    Checkpoints,
    CriterionName,
    Data,
    Device,
    DeviceMap,
    Dtype,
    InputColumn,
    Json,
    Kind,
    Labels,
    Limit,
    MaxLength,
    Model,
    Out,
    Over,
    Overwrite,
    PassTokens,
    PromptText,
    Resume,
    Select,
    System,
    TargetColumn,
    TargetName,
    Threads,
    UnitOption,
    Unlabeled,
)
from secateur.cli.shared.torchrun import processes
from secateur.cli.shared.unused import require_unused
from secateur.support.files import claimed
from secateur_kernels.backend import Backend


def attribute(
    model: Model,
    data: Data,
    out: Out,
    kind: Kind = None,
    labels: Labels = "auto",
    input_column: InputColumn = None,
    target_column: TargetColumn = None,
    prompt: PromptText = None,
    chat: Chat = False,
    system: System = None,
    unit: UnitOption = "head",
    select: Select = None,
    criterion: CriterionName = "gradient",
    target: TargetName = None,
    over_examples: Over = None,
    unlabeled: Unlabeled = False,
    examples: Limit = None,
    max_tokens: PassTokens = None,
    max_length: MaxLength = None,
    per_example: Annotated[bool, typer.Option(help="Also write the scores of each single example.")] = False,
    backend: Annotated[str, typer.Option(help="Kernels: reference, triton, or auto (Triton on a GPU).")] = "auto",
    checkpoint: Checkpoints = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score each unit by its effect on a task; write the scores (safetensors). torchrun splits the examples among processes."""
    inputs.use_threads(threads)
    if checkpoint is None:
        require_unused("without --checkpoint", resume=(resume, False))
    inputs_given = output.inputs_among({"model": model, "data": data, "labels": labels})
    with (
        processes(device, device_map) as ranks,
        nullcontext() if ranks.rank else claimed(out, "file", overwrite=overwrite, inputs=inputs_given),
    ):
        # All processes have joined the group, and none scores before all have looked.
        if checkpoint is not None and not resume:
            Checkpoint.require_not_begun(checkpoint)
        chosen = inputs.make_criterion(criterion, target, over_examples, unlabeled)
        options = inputs.data_options(input_column, target_column, (prompt, chat, system), labels, unlabeled)
        loaded, task, rows = inputs.prepare(
            model,
            data,
            options,
            task=kind,
            examples=examples,
            max_length=max_length,
            device=device,
            dtype=dtype,
            device_map=device_map,
        )
        scores = secateur.attribute(
            loaded.model, task, rows, criterion=chosen, unit=inputs.unit(unit), select=select, max_tokens=max_tokens,
            per_example=per_example, backend=cast(Backend, backend), checkpoint=checkpoint, group=ranks.group,
            progress=None if ranks.rank else bars(),
        )  # fmt: skip
        if ranks.rank == 0:
            scores.save(out)
    if ranks.rank:
        return
    document = {"out": str(out), "examples": scores.examples, "criterion": scores.criterion, "sites": len(scores.sites)}
    if scores.convergence is not None:
        document["convergence"] = scores.convergence.summary()
    error, lines = scores.relative_error(), [f"{scores.examples} examples; scores written to {out}"]
    if error is not None:
        document["relative_error"] = error
        lines.insert(0, f"standard error of a score over examples and draws: {error:.0%} of the mean score")
    output.emit(document, as_json, output.scores_table(scores), *output.convergence(scores), *lines)
