"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

UnitOption = Annotated[str, typer.Option("--unit", help="What is removed from attention: head or channel.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")]
