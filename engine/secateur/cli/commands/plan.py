"""`secateur plan`: choose from scores which units stay, and write the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

import secateur
from secateur.attribution.scores import Scores
from secateur.cli.shared import inputs, output
from secateur.cli.shared.options import (
    Align,
    AllocationName,
    Floor,
    Flops,
    Json,
    Keep,
    Memory,
    Out,
    Params,
    PerHead,
    ShapeName,
)
from secateur.flow.loaded import device_named
from secateur.planning.allocation import Allocation
from secateur.planning.shapes import Shape


@output.claims_out("file")
def plan(
    scores: Annotated[Path, typer.Argument(help="File of scores, from attribute.")],
    out: Out,
    keep: Keep = None,
    flops: Flops = None,
    params: Params = None,
    memory: Memory = None,
    allocation: AllocationName = "uniform",
    floor: Floor = None,
    align: Align = "1",
    per_head: PerHead = False,
    shape: ShapeName = "any",
    as_json: Json = False,
) -> None:
    """Choose from scores which units stay within a budget; write the plan (JSON)."""
    chosen = secateur.plan(
        Scores.load(scores),
        keep=keep,
        flops=flops,
        params=params,
        memory=memory,
        allocation=cast(Allocation, allocation),
        floor=floor or 0.0,
        align=inputs.alignment(align, device_named("auto").type),
        per_head=per_head,
        shape=cast(Shape, shape),
    )
    chosen.save(out)
    document = {"out": str(out), "budget": chosen.budget_json(), "kept": {name: len(kept) for name, kept in chosen.items()}}
    left = chosen.budget_json()["remaining"]
    line = (
        f"of the layers remain {left['params']:.1%} of the parameters, {left['flops']:.1%} of the FLOPs; plan written to {out}"
    )
    output.emit(document, as_json, output.plan_table(chosen), line)
