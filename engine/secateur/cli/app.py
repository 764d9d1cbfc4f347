"""The application: all commands under their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import secateur
from secateur.cli.commands import ldnet
from secateur.cli.commands.attribute import attribute
from secateur.cli.commands.benchmark import benchmark
from secateur.cli.commands.demo import demo
from secateur.cli.commands.evaluate import evaluate
from secateur.cli.commands.layer_gates import layer_gates
from secateur.cli.commands.layers import layers
from secateur.cli.commands.multitask import multitask
from secateur.cli.commands.plan import plan
from secateur.cli.commands.prune import prune
from secateur.cli.commands.reproduce_ap import ap_
from secateur.cli.commands.reproduce_ldnet import ldnet as ldnet_paper
from secateur.cli.commands.reproduce_multitask import multitask as multitask_paper
from secateur.cli.commands.score import score
from secateur.cli.commands.sites import criteria, sites
from secateur.cli.commands.sweep import sweep_

app = typer.Typer(
    help="Cut a multi-task language model down to the one task that you run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "sites": sites,
    "criteria": criteria,
    "attribute": attribute,
    "plan": plan,
    "prune": prune,
    "evaluate": evaluate,
    "benchmark": benchmark,
    "sweep": sweep_,
    "score": score,
    "layers": layers,
    "layer-gates": layer_gates,
    "multitask": multitask,
}
for _name, _command in _COMMANDS.items():
    app.command(name=_name)(_command)
app.command(name="bench", hidden=True)(benchmark)  # The command's earlier name.
app.add_typer(ldnet.app, name="ldnet")

reproduce = typer.Typer(
    help="Repeat papers' experiments as resumable runs, with figures and a check of the papers' claims.", no_args_is_help=True
)
reproduce.command(name="ap")(ap_)
reproduce.command(name="multitask")(multitask_paper)
reproduce.command(name="ldnet")(ldnet_paper)
app.add_typer(reproduce, name="reproduce")


def _print_version(requested: bool) -> None:
    """Print the version and exit, if --version is given."""
    if requested:
        print(secateur.__version__)
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass
