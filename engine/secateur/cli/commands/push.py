"""`secateur push`: upload a folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import secateur
from secateur.cli.shared import output
from secateur.cli.shared.options import Json


def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a pruned model.")],
    repository: Annotated[str, typer.Argument(help="The repository: OWNER/NAME. It is created if it does not exist.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository; refuse a public one that exists.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit; by default, it names the folder.")] = None,
    as_json: Json = False,
) -> None:
    """Upload the folder of a pruned model, with its card, to a model repository on the Hugging Face Hub."""
    address = secateur.push(folder, repository, private=private, message=message or "")
    output.emit({"folder": str(folder), "repository": repository, "url": address}, as_json, f"pushed to {address}")
