"""`secateur reproduce multitask`: compare one pruned model for several tasks with pruned models of single tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.shared import inputs, output
from secateur.cli.shared.options import MOST_SEED, Device, Json, RunFolder, Threads
from secateur.cli.shared.reproducing import run_cells
from secateur.cli.shared.unused import require_unused
from secateur.data import builtin
from secateur.flow.loaded import device_named
from secateur.model.offloading import weights_digest
from secateur.support.environment import environment
from secateur.support.errors import InputError
from secateur.support.fields import MOST_STEPS
from secateur.support.files import require_run_folder
from secateur.support.ledger import ROWS, content_hash
from secateur.tasks.fitting import reader_digest

# The default tasks of the preset builtin.
BUILTIN_TASKS = ("domain", "language", "qtype")
EXPERIMENTS = ("settings", "mixture", "low-resource", "initial-scores")

Model = Annotated[
    str | None,
    typer.Option(help="An encoder: a folder, a Hub name, or 'builtin' (that of the built-in T5); by default, the preset's."),
]
Preset = Annotated[
    str,
    typer.Option(help="Model and data: builtin, paper (BERT-base on MNLI, QQP, SQuAD), or paper-nine (on GLUE and SQuAD)."),
]
Tasks = Annotated[
    str | None, typer.Option(help="Some of the preset's tasks, separated by commas; for builtin, any closed task.")
]
Experiments = Annotated[
    str | None, typer.Option(help=f"Some of {', '.join(EXPERIMENTS)}, separated by commas; by default, all.")
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Training steps of a task; by default, 100 for builtin, and 8 epochs for the papers' presets.",
        min=1,
        max=MOST_STEPS,
    ),
]
Densities = Annotated[
    str | None,
    typer.Option(
        help="Densities of elements and ranks, separated by commas; by default, the paper's, or lower ones for 'builtin'."
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate", help="Learning rate of the weights; by default, 0.001 for 'builtin', else the paper's 3e-5."
    ),
]
Root = Annotated[
    Path | None, typer.Option("--data-root", help="With a paper's preset: read ROOT/NAME/SPLIT.parquet instead of the Hub.")
]


@output.resumes
def multitask(
    out: RunFolder,
    model: Model = None,
    preset: Preset = "builtin",
    tasks: Tasks = None,
    experiments: Experiments = None,
    steps: Steps = None,
    densities: Densities = None,
    learning_rate: Rate = None,
    examples: Annotated[int | None, typer.Option(help="Most training examples of a task; by default, all.", min=2)] = None,
    tested: Annotated[int | None, typer.Option(help="Most examples of a task to test on; by default, all.", min=2)] = None,
    seed: Annotated[int, typer.Option(help="Seed of heads, sampling and dropout.", min=0, max=MOST_SEED)] = 0,
    data_root: Root = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Repeat multitask pruning (Xia and Shin 2021): eight settings, against single-task models at the same budget."""
    from secateur.cli.commands.multitask import load_encoder
    from secateur.reproduction.multitask import grid, report

    inputs.use_threads(threads)
    require_run_folder(out)
    if preset not in ("builtin", "paper", "paper-nine"):
        raise InputError(f"preset: expected builtin, paper or paper-nine, got {preset!r}")
    if preset == "builtin":
        require_unused("with --preset builtin", data_root=(data_root, None))
    names = inputs.among("tasks", tasks, *_tasks(preset))
    if len(names) < 2:
        raise InputError(f"tasks: expected at least two, got {names[0]!r}")
    chosen = inputs.among("experiments", experiments, EXPERIMENTS)
    settings = _settings(
        preset, model, names, chosen, _densities(densities), learning_rate, steps, examples=examples, tested=tested, seed=seed
    )
    place = device_named(device)
    data = {name: _data(preset, name, settings, data_root) for name in names}
    encoder, tokenizer = load_encoder(settings.model)
    cells = grid.grid(settings)
    laboratory = grid.Laboratory(encoder, tokenizer, data, settings, out, place.type)
    rows = {name: [of_task.train, of_task.test] for name, of_task in data.items()}
    identity = {"weights": weights_digest(encoder), "tokenizer": reader_digest(tokenizer), ROWS: content_hash(rows)}
    run_cells(
        out, {**settings.to_json(), **identity}, cells, laboratory.run,
        lambda rows: report.write(out, rows, settings, environment(encoder)), as_json, settings.results,
    )  # fmt: skip


def _tasks(preset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tasks of a preset that can be chosen, and its default tasks."""
    from secateur.reproduction.multitask import encoder_sets

    if preset == "builtin":
        return tuple(name for name in builtin.tasks() if name not in ("negation", "question")), BUILTIN_TASKS
    names = encoder_sets.THREE if preset == "paper" else encoder_sets.NINE
    return names, names


def _densities(given: str | None) -> dict[str, tuple[float, ...]] | None:
    """Parse densities, for elements and for ranks."""
    if given is None:
        return None
    try:
        densities = tuple(sorted({float(number) for number in given.split(",")}))
    except ValueError:
        raise InputError(f"densities: expected numbers between commas, got {given!r}") from None
    if not all(0 < density <= 1 for density in densities):
        raise InputError(f"densities: expected shares in (0, 1], got {given!r}")
    return {"element": densities, "rank": densities}


def _settings(
    preset: str,
    model: str | None,
    tasks: tuple[str, ...],
    experiments: tuple[str, ...],
    densities: dict[str, tuple[float, ...]] | None,
    learning_rate: float | None,
    steps: int | None,
    **own: Any,
) -> Any:
    """The settings of the run: the paper's, with exceptions.

    The built-in data, whose texts are short, get short training. The built-in encoder, which is a fiftieth of BERT-base, also
    gets smaller densities and higher learning rates.
    """
    from secateur.reproduction.multitask.grid import Settings

    model = model or ("builtin" if preset == "builtin" else "google-bert/bert-base-uncased")
    rates = {"weights": 3e-5, "scores": 1e-2, "sigma": 5e-3}
    wanted: dict[str, tuple[float, ...]] = {"element": (0.1, 0.3, 0.5, 0.7), "rank": (0.076, 0.226, 0.376)}
    own |= {"max_length": 384, "few": 1000}
    if preset == "builtin":
        steps = steps or 100
        own |= {"batch_size": 16, "max_length": 48, "few": 100}
    if model == "builtin":
        wanted = {"element": (0.02, 0.05, 0.15), "rank": (0.05, 0.1, 0.2)}
        rates["weights"] = 1e-3
        own["low_density"] = 0.05
    if learning_rate is not None:
        rates["weights"] = learning_rate
    wanted = densities or wanted
    # An equal share of each budget for each task, and twice the share of the largest, for ensembles that share it unequally.
    single = {
        kind: (*(d / len(tasks) for d in budgets), min(1.0, 2 * budgets[-1] / len(tasks))) for kind, budgets in wanted.items()
    }
    return Settings(
        model=model,
        tasks=tasks,
        experiments=experiments,
        densities=wanted,
        single_densities=single,
        steps=steps,
        rates=rates,
        **own,
    )


def _data(preset: str, name: str, settings: Any, root: Path | None) -> Any:
    """The task of an encoder, its training examples and its test examples."""
    from secateur.learned.multitask.encoder_tasks import Classification
    from secateur.learned.multitask.run import TaskData
    from secateur.reproduction.multitask import encoder_sets

    if preset == "builtin":
        train, test = builtin.examples(name), builtin.examples(f"{name}.test")
        task = Classification(tuple(sorted({row["target"] for row in train})))
        return TaskData(task, train[: settings.examples], test[: settings.tested])
    evaluation = encoder_sets.SETS[name].evaluation
    return TaskData(
        encoder_sets.task(name),
        encoder_sets.examples(name, "train", root, settings.examples),
        encoder_sets.examples(name, evaluation, root, settings.tested),
    )
