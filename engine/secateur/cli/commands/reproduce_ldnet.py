"""`secateur reproduce ldnet`: taggers on densely connected language models, whole and with most layers pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from secateur.cli.commands.ldnet import file_size, require_positive
from secateur.cli.shared import inputs
from secateur.cli.shared.options import Device, Json, Threads
from secateur.cli.shared.reproducing import run_cells
from secateur.cli.shared.tagged import tagged_sentences
from secateur.data.conll import Sentence
from secateur.flow.loaded import device_named
from secateur.support.environment import environment
from secateur.support.errors import InputError

# The paper's sizes, and training as long as its code's: of a language model at most, of a tagger at least. The preset small is
# what `Settings` has by default.
PAPER: dict[str, Any] = {
    "layers": 10, "width": 300, "projection": 1600, "steps": 1_600_000, "lm_batch_size": 128, "lm_learning_rate": 1e-3,
    "epochs": 50.0, "prune_epochs": 50.0, "features": 300, "word_width": 100, "hidden": 150,
}  # fmt: skip

Out = Annotated[Path, typer.Option(help="Folder of the run. One that was begun with the same settings goes on.")]
Columns = Annotated[
    list[str], typer.Option("--column", metavar="NAME=COLUMN", help="A task: its name, and its tags' column. Can be repeated.")
]
Preset = Annotated[str, typer.Option(help="small: 10 layers of 50, minutes to hours on a CPU; paper: 10 layers of 300.")]


def ldnet(
    data: Annotated[Path, typer.Option(help="Column file to train on: a token and its tags a line.")],
    evaluation: Annotated[Path, typer.Option("--eval", help="Column file to evaluate on.")],
    column: Columns,
    out: Out,
    test: Annotated[Path | None, typer.Option(help="Another column file to evaluate on.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text for the language models, a sentence a line; by default the tokens of --data.")
    ] = None,
    preset: Preset = "small",
    layers: Annotated[int | None, typer.Option(help="Of the language models, in each direction.", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Of each layer.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Of the language models' training.", min=1)] = None,
    epochs: Annotated[float | None, typer.Option(help="Of the whole taggers' training.")] = None,
    prune_epochs: Annotated[float | None, typer.Option(help="Of the training with the penalty.")] = None,
    wanted: Annotated[str, typer.Option(help="Layers of both directions together that stay: numbers between commas.")] = "2",
    lambda0: Annotated[float, typer.Option(help="Weight of the penalty; the paper: 0.05 for entities, 0.5 for chunks.")] = 0.05,
    learning_rate: Annotated[float, typer.Option(help="Of the taggers' SGD.")] = 0.015,
    gate_learning_rate: Annotated[float, typer.Option(help="Of the gates' projected SGD.")] = 0.15,
    batch_size: Annotated[int, typer.Option(help="Sentences of a step of the taggers.", min=1)] = 10,
    examples: Annotated[int | None, typer.Option(help="Sentences to train a tagger on, at most.", min=1)] = None,
    tested: Annotated[int | None, typer.Option(help="Sentences of --eval to evaluate on, at most.", min=1)] = None,
    token_column: Annotated[str, typer.Option(help="Of the tokens, as a column of --column.")] = "1",
    seed: Annotated[int, typer.Option(help="Of weights, dropout and the order of examples.", min=0)] = 0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """LD-Net (Liu et al. 2018): taggers with and without language models, the layers pruned, with and without layer dropout."""
    from secateur.learned.ldnet.tagger_training import GatePenalty
    from secateur.learned.shared.trainer import require_accelerate
    from secateur.reproduction.ldnet import grid, report

    inputs.use_threads(threads)
    place = device_named(device)
    require_accelerate()
    if preset not in ("small", "paper"):
        raise InputError(f"preset: expected small or paper, got {preset!r}")
    given = {"layers": layers, "width": width, "steps": steps, "epochs": epochs, "prune_epochs": prune_epochs}
    chosen = {**(PAPER if preset == "paper" else {}), **{name: value for name, value in given.items() if value is not None}}
    files = {"data": data, "eval": evaluation, "test": test, "text": text}
    settings = grid.Settings(
        files={name: (str(path), file_size(path)) for name, path in files.items() if path is not None},
        columns=_columns(column), wanted=tuple(sorted(set(inputs.numbers(wanted, "wanted")))), token_column=token_column,
        batch_size=batch_size, learning_rate=learning_rate, gate_learning_rate=gate_learning_rate, lambda0=lambda0,
        examples=examples, tested=tested, seed=seed, **chosen,
    )  # fmt: skip
    require_positive(epochs=settings.epochs, prune_epochs=settings.prune_epochs, learning_rate=learning_rate)
    if settings.wanted[0] >= 2 * settings.layers or settings.wanted[-1] > 2 * settings.layers:
        raise InputError(f"wanted: expected numbers up to {2 * settings.layers}, one of them below it, got {wanted!r}")
    GatePenalty(lambda0, settings.wanted[0], learning_rate=gate_learning_rate)  # Which says what it does not take.
    tasks = {name: _task(where, files, token_column) for name, where in settings.columns.items()}
    laboratory = grid.Laboratory(tasks, text, settings, out, place.type)
    about = environment(torch.nn.Linear(1, 1).to(place))
    run_cells(
        out, settings.to_json(), grid.grid(settings), laboratory.run,
        lambda rows: report.write(out, rows, settings, about), as_json,
    )  # fmt: skip


def _columns(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        name, equals, where = each.partition("=")
        if not name.isidentifier() or not equals or not where or name in found:
            raise InputError(f"column: expected NAME=COLUMN, each name once, got {each!r}")
        found[name] = where
    return found


def _task(column: str, files: dict[str, Path | None], token_column: str) -> Any:
    from secateur.reproduction.ldnet.grid import TaskSentences

    scheme = "auto"
    found: dict[str, list[Sentence]] = {}
    for name in ("data", "eval", "test"):
        path = files[name]
        found[name] = []
        if path is not None:
            found[name], about = tagged_sentences(path, column, token_column, scheme)
            scheme = about["scheme"]
    return TaskSentences(found["data"], found["eval"], found["test"])
