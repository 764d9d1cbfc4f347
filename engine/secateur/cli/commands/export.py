"""`secateur export`: write a folder in the format of another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.shared import inputs, output
from secateur.cli.shared.options import Json, Out, Threads
from secateur.exporting.base import FORMATS
from secateur.exporting.export import export as export_


@output.claims_out()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder of a model, pruned or not.")],
    out: Out,
    format: Annotated[str, typer.Option(help="; ".join(f"{name}: {each.about}" for name, each in FORMATS.items()) + ".")],
    dtype: Annotated[
        str, typer.Option(help="Dtype of the matrices: float32, float16, bfloat16; auto: the one that the folder stores.")
    ] = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write the folder of a model as what another engine loads, and compare the engine with PyTorch where it is installed."""
    inputs.use_threads(threads)
    exported = export_(folder, out, format=format, dtype=dtype)
    output.emit({**exported.document, "out": str(out)}, as_json, *exported.lines())
