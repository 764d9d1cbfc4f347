"""`secateur reproduce ldnet`: train taggers on densely connected language models, whole and with most layers pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from secateur.cli.commands.ldnet import EvalFile, GateRate, Lambda0, Seed, TrainFile, require_positive
from secateur.cli.shared import inputs, output
from secateur.cli.shared.options import MOST_LAYERS, Device, Json, RunFolder, Threads
from secateur.cli.shared.reproducing import run_cells
from secateur.cli.shared.tagged import tagged_sentences
from secateur.data.conll import Sentence
from secateur.flow.loaded import device_named
from secateur.support.environment import environment
from secateur.support.errors import InputError
from secateur.support.fields import MOST_STEPS
from secateur.support.files import require_run_folder
from secateur.support.ledger import file_state

# The paper's sizes. Language models train at most as long as in its code, and taggers at least as long. The preset small has
# the defaults of `Settings`.
PAPER: dict[str, Any] = {
    "layers": 10, "width": 300, "projection": 1600, "steps": 1_600_000, "lm_batch_size": 128, "lm_learning_rate": 1e-3,
    "epochs": 50.0, "prune_epochs": 50.0, "features": 300, "word_width": 100, "hidden": 150,
}  # fmt: skip

Columns = Annotated[
    list[str],
    typer.Option(
        "--target-column",
        metavar="NAME=COLUMN",
        help="A task: its name, and the column of its tags. Repeat the option for more tasks.",
    ),
]
Preset = Annotated[
    str, typer.Option(help="Sizes: small (10 layers of width 50, minutes to hours on a CPU) or paper (10 layers of width 300).")
]


@output.resumes
def ldnet(
    data: TrainFile,
    evaluation: EvalFile,
    column: Columns,
    out: RunFolder,
    test: Annotated[Path | None, typer.Option(help="A second column file to evaluate on.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text for the language models, one sentence on a line; by default, the tokens of --data."),
    ] = None,
    preset: Preset = "small",
    layers: Annotated[
        int | None,
        typer.Option(help="Layers of the language models in each direction; by default, the preset's.", min=1, max=MOST_LAYERS),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Width of a layer; by default, the preset's.", min=1)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of the language models; by default, the preset's.", min=1, max=MOST_STEPS)
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Epochs of the whole taggers' training; by default, the preset's.")
    ] = None,
    prune_epochs: Annotated[
        float | None, typer.Option(help="Epochs of the training with the penalty; by default, the preset's.")
    ] = None,
    wanted: Annotated[
        str, typer.Option(help="Numbers of layers to keep, in both directions together, separated by commas.")
    ] = "2",
    lambda0: Lambda0 = 0.05,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the taggers' SGD.")] = 0.015,
    gate_learning_rate: GateRate = 0.15,
    batch_size: Annotated[int, typer.Option(help="Sentences in a training step of the taggers.", min=1)] = 10,
    examples: Annotated[int | None, typer.Option(help="Most sentences to train a tagger on; by default, all.", min=1)] = None,
    tested: Annotated[int | None, typer.Option(help="Most sentences of --eval to evaluate on; by default, all.", min=1)] = None,
    token_column: Annotated[
        str, typer.Option("--input-column", help="Column of the tokens, in the same form as a column of --target-column.")
    ] = "1",
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Repeat LD-Net (Liu et al. 2018): taggers with and without language models, layers pruned, and layer dropout on or off."""
    from secateur.learned.ldnet.tagger_training import GatePenalty
    from secateur.reproduction.ldnet import grid, report
    from secateur.support.trainer import require_accelerate

    inputs.use_threads(threads)
    require_run_folder(out)
    place = device_named(device)
    require_accelerate()
    if preset not in ("small", "paper"):
        raise InputError(f"preset: expected small or paper, got {preset!r}")
    given = {"layers": layers, "width": width, "steps": steps, "epochs": epochs, "prune_epochs": prune_epochs}
    chosen = {**(PAPER if preset == "paper" else {}), **{name: value for name, value in given.items() if value is not None}}
    files = {"data": data, "eval": evaluation, "test": test, "text": text}
    states = {name: file_state(path) for name, path in files.items() if path is not None}
    settings = grid.Settings(
        files={name: (str(files[name]), size) for name, (size, _) in states.items()},
        columns=_columns(column), wanted=tuple(sorted(set(inputs.numbers(wanted, "wanted")))), token_column=token_column,
        batch_size=batch_size, learning_rate=learning_rate, gate_learning_rate=gate_learning_rate, lambda0=lambda0,
        examples=examples, tested=tested, seed=seed, **chosen,
    )  # fmt: skip
    require_positive(epochs=settings.epochs, prune_epochs=settings.prune_epochs, learning_rate=learning_rate)
    if settings.wanted[0] >= 2 * settings.layers or settings.wanted[-1] > 2 * settings.layers:
        raise InputError(f"wanted: expected numbers up to {2 * settings.layers}, one of them below it, got {wanted!r}")
    GatePenalty(lambda0, settings.wanted[0], learning_rate=gate_learning_rate)  # Its constructor checks these settings.
    tasks = {name: _task(where, files, token_column) for name, where in settings.columns.items()}
    laboratory = grid.Laboratory(tasks, text, settings, out, place.type)
    about = environment(torch.nn.Linear(1, 1).to(place))
    run_cells(
        out, {**settings.to_json(), "states": states}, grid.grid(settings), laboratory.run,
        lambda rows: report.write(out, rows, settings, about), as_json, grid.RESULTS,
    )  # fmt: skip


def _columns(given: list[str]) -> dict[str, str]:
    """Parse NAME=COLUMN options."""
    columns: dict[str, str] = {}
    for option in given:
        name, equals, where = option.partition("=")
        if not name.isidentifier() or not equals or not where or name in columns:
            raise InputError(f"target-column: expected NAME=COLUMN, each name once, got {option!r}")
        columns[name] = where
    return columns


def _task(column: str, files: dict[str, Path | None], token_column: str) -> Any:
    """The sentences of a task in all files."""
    from secateur.reproduction.ldnet.grid import TaskSentences

    scheme = "auto"
    sentences: dict[str, list[Sentence]] = {}
    for name in ("data", "eval", "test"):
        path = files[name]
        sentences[name] = []
        if path is not None:
            sentences[name], about = tagged_sentences(path, column, token_column, scheme)
            scheme = about["scheme"]
    return TaskSentences(sentences["data"], sentences["eval"], sentences["test"])
