"""`secateur prune`: run `secateur.compress` from scoring to the benchmark, or make a dry run of it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn

import secateur
from secateur.cli.commands import dry_run
from secateur.cli.shared import inputs, output
from secateur.cli.shared.bars import bars
from secateur.cli.shared.options import (
    BUDGET,
    CHECKS,
    SCORING,
    Align,
    AllocationName,
    Chat,
    CriterionName,
    DataUnlessDry,
    Device,
    DryRunOption,
    Dtype,
    Eval,
    Floor,
    Flops,
    InputColumn,
    Json,
    Keep,
    Kind,
    Labels,
    Latency,
    Lengths,
    Limit,
    MaxLength,
    Memory,
    Model,
    OutUnlessDry,
    Over,
    Params,
    PassTokens,
    PerHead,
    Private,
    PromptText,
    Push,
    Recover,
    ScoresOption,
    Select,
    ShapeName,
    Sizes,
    Speedup,
    System,
    TargetColumn,
    TargetName,
    Threads,
    UnitOption,
    Unlabeled,
)
from secateur.cli.shared.unused import require_unused
from secateur.exporting.base import FORMATS
from secateur.exporting.export import export, require_exportable, require_format
from secateur.flow.effort import EFFORTS, Effort
from secateur.flow.engines import ENGINES, Needs, needs_of, require_engine
from secateur.flow.loaded import device_named, meta_model
from secateur.flow.model_card import CARD_FILE
from secateur.flow.push import require_pushable
from secateur.planning.allocation import Allocation
from secateur.planning.budget import Budget
from secateur.planning.plan import Plan
from secateur.planning.shapes import Shape
from secateur.support.errors import InputError, VerificationError


@output.claims_out()
def prune(
    model: Model,
    data: DataUnlessDry = None,
    out: OutUnlessDry = None,
    evaluation: Eval = None,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="Plan to carry out (JSON, from plan), instead of scores and a budget.", rich_help_panel=BUDGET
        ),
    ] = None,
    dry: DryRunOption = False,
    scores_file: ScoresOption = None,
    keep: Keep = None,
    flops: Flops = None,
    params: Params = None,
    memory: Memory = None,
    speedup: Speedup = None,
    latency: Latency = None,
    allocation: AllocationName = "auto",
    floor: Floor = None,
    rounds: Annotated[
        int,
        typer.Option(help="Number of rounds: prune a part, score the rest again, and so on.", min=1, rich_help_panel=BUDGET),
    ] = 1,
    kind: Kind = None,
    labels: Labels = "auto",
    input_column: InputColumn = None,
    target_column: TargetColumn = None,
    prompt: PromptText = None,
    chat: Chat = False,
    system: System = None,
    unit: UnitOption = "head",
    select: Select = None,
    criterion: CriterionName = "auto",
    effort: Annotated[
        str,
        typer.Option(help=f"How much to try: {', '.join(EFFORTS)}. See secateur.compress.", rich_help_panel=SCORING),
    ] = "default",
    target: TargetName = None,
    over_examples: Over = None,
    unlabeled: Unlabeled = False,
    examples: Limit = None,
    max_tokens: PassTokens = None,
    max_length: MaxLength = None,
    align: Align = "auto",
    per_head: PerHead = False,
    shape: ShapeName = "any",
    for_engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            help=f"Engine that will run the model: {', '.join(ENGINES)}. It sets --shape and --align. What it reads is "
            "written into --out.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    recover: Recover = "auto",
    heal: Annotated[
        float | None,
        typer.Option(help="Minutes of training against the dense model after the recovery.", rich_help_panel=CHECKS),
    ] = None,
    batch_sizes: Sizes = "1,32",
    lengths: Lengths = "64",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    push: Push = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Score, plan, prune, verify, recover, evaluate and benchmark; write a model folder with its report."""
    inputs.use_threads(threads)
    chosen = None
    if criterion != "auto" or target is not None or over_examples is not None:
        named = "gradient" if criterion == "auto" else criterion
        chosen = inputs.make_criterion(named, target, over_examples, unlabeled)
    amounts = {"keep": keep, "flops": flops, "params": params, "memory": memory, "speedup": speedup, "latency": latency}
    if plan_file is not None and any(amount is not None for amount in amounts.values()):
        raise InputError("plan: expected --plan or a budget, got both")
    if plan_file is not None:
        require_unused(
            "with --plan", criterion=(criterion, "auto"), target=(target, None), over_examples=(over_examples, None),
            sites=(select, None), unit=(unit, "head"), rounds=(rounds, 1), allocation=(allocation, "auto"), floor=(floor, None),
            align=(align, "auto"), per_head=(per_head, False), shape=(shape, "any"),
        )  # fmt: skip
    budget = None if plan_file is not None else Budget.of(**amounts)
    if budget is not None:  # Refuse a wrong budget before the scoring, which takes long.
        budget.check_spread("uniform" if allocation == "auto" else allocation, floor or 0.0)
    recoveries = inputs.recoveries(recover, tries=True)
    given = None if plan_file is None else Plan.load(plan_file)
    if for_engine is not None:
        require_engine(for_engine)
        require_unused(
            "with --for", shape=(shape, "any"), plan=(plan_file, None), unit=(unit, "head"), per_head=(per_head, False),
        )  # fmt: skip
    shapes = inputs.shapes(batch_sizes, lengths)
    if dry:
        sizes = meta_model(model, task=kind, dtype=dtype)
        needs = _needs(for_engine, sizes, shape)
        planning = {
            "floor": floor or 0.0, "per_head": per_head, "shape": needs.shape,
            "align": inputs.alignment(align, device_named(device).type, needs.align),
            "allocation": "uniform" if allocation == "auto" else allocation,
        }  # fmt: skip
        document, shown = dry_run.run(
            model, sizes, given, scores_file, budget, shapes, unit=inputs.unit(unit), select=select,
            max_tokens=max_tokens, **({} if given is not None else planning),
        )  # fmt: skip
        output.emit(document, as_json, *shown)
        return
    data, out = dry_run.require_real(data, out, scores_file)
    if private and push is None:
        raise InputError("private: expected --push OWNER/NAME with it, got none")
    if push is not None:  # The upload follows when the folder is complete (run_file.configurable).
        require_pushable(push, private=private)
    options = inputs.data_options(input_column, target_column, (prompt, chat, system), labels, unlabeled)
    loaded, task, rows = inputs.prepare(
        model, data, options, task=kind, examples=examples, max_length=max_length, device=device, dtype=dtype
    )
    needs = _needs(for_engine, loaded.model, shape)
    if needs.format is not None:
        require_exportable(require_format(needs.format), loaded.model, loaded.tokenizer)
    held_out = None if evaluation is None else inputs.read(evaluation, loaded, replace(options, unlabeled=False))
    compressed = secateur.compress(
        loaded, rows, task, keep=keep, flops=flops, params=params, memory=memory, speedup=speedup, latency=latency, plan=given,
        evaluation=held_out, out=out, unit=inputs.unit(unit), select=select, criterion=chosen, effort=cast(Effort, effort),
        unlabeled=unlabeled, rounds=rounds, floor=floor,
        allocation=None if allocation == "auto" else cast(Allocation, allocation),
        align=None if given is not None else inputs.alignment(align, loaded.device, needs.align),
        per_head=per_head, shape=needs.shape, recoveries=recoveries, heal=heal, max_tokens=max_tokens,
        batch_sizes=shapes[0], lengths=shapes[1], progress=bars(),
        say=output.say,
    )  # fmt: skip
    document = {**compressed.to_json(), "out": str(out)}
    shown = [*output.compared(compressed.comparison), *compressed.lines(), f"written to {out}"]
    shown += compressed.usage(out).lines(elsewhere=for_engine is None)
    failed: InputError | VerificationError | None = None
    if for_engine is not None:
        try:
            shown += _for_engine(for_engine, needs, out, loaded.stored, document)
        except (InputError, VerificationError) as error:
            failed = error
    output.emit(document, as_json, *shown)
    if failed is not None:
        raise type(failed)(f"{out} is written, and its {needs.format} is not: {failed}") from failed


def _needs(engine: str | None, model: nn.Module, shape: str) -> Needs:
    """What the engine of --for needs of a model, or else what --shape says."""
    if engine is None:
        return Needs(cast(Shape, shape))
    needs = needs_of(engine, model)
    widths = f", FFN widths in multiples of {needs.align}" if needs.align > 1 else ""
    output.say(f"for {engine}: shape {needs.shape}{widths}")
    return needs


def _for_engine(engine: str, needs: Needs, out: Path, stored: torch.dtype, document: dict[str, Any]) -> list[str]:
    """Write what an engine reads into a folder. Returns lines that say so, and adds the export to the command's document."""
    read, lines = out, []
    if needs.format is not None:
        output.say(f"writing {needs.format}")
        # A format that has no place for the folder's dtype holds its numbers in float32.
        held = str(stored).removeprefix("torch.") in FORMATS[needs.format].dtypes
        exported = export(out, out / needs.format, format=needs.format, dtype="auto" if held else "float32")
        document["export"] = exported.document
        read, lines = exported.out, exported.lines()
    command = needs.serve.format(shlex.quote(str(read)))
    with (out / CARD_FILE).open("a", encoding="utf-8") as card:
        block = f"\n\n```sh\n{command}\n```" if command else ""
        card.write(f"\n## For {engine}\n\n{engine} reads `{read}`.{block}\n")
    return [*lines, *([f"serve it: {command}"] if command else [])]
