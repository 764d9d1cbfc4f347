"""`secateur reproduce multitask`: one pruned model for several tasks against pruned models of single tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.shared import inputs
from secateur.cli.shared.options import Device, Json, Threads
from secateur.cli.shared.reproducing import run_cells
from secateur.data import builtin
from secateur.flow.loaded import device_named
from secateur.support.environment import environment
from secateur.support.errors import InputError

# What a preset fixes: its tasks, the model, and settings that its size asks for.
BUILTIN_TASKS = ("domain", "language", "qtype")
EXPERIMENTS = ("settings", "mixture", "low-resource", "initial-scores")

Out = Annotated[Path, typer.Option(help="Folder of the run. One that was begun with the same settings goes on.")]
Model = Annotated[str | None, typer.Option(help="An encoder: folder, Hub name, or 'builtin' (of the built-in T5).")]
Preset = Annotated[
    str,
    typer.Option(help="builtin: built-in encoder and data; paper: BERT-base on MNLI, QQP, SQuAD; paper-nine: GLUE and SQuAD."),
]
Tasks = Annotated[str | None, typer.Option(help="Some of the preset's tasks, between commas; builtin: any closed task.")]
Experiments = Annotated[str | None, typer.Option(help=f"Some of {', '.join(EXPERIMENTS)}, between commas.")]
Steps = Annotated[int | None, typer.Option(help="Of training for each task; paper: 8 epochs.", min=1)]
Densities = Annotated[
    str | None, typer.Option(help="Of elements and of ranks, between commas; by default the paper's, lower ones for 'builtin'.")
]
Rate = Annotated[
    float | None, typer.Option("--learning-rate", help="Of the weights; 0.001 for 'builtin', else the paper's 3e-5.")
]
Root = Annotated[Path | None, typer.Option("--data-root", help="With a paper's preset: ROOT/NAME/SPLIT.parquet, not the Hub.")]


def multitask(
    out: Out,
    model: Model = None,
    preset: Preset = "builtin",
    tasks: Tasks = None,
    experiments: Experiments = None,
    steps: Steps = None,
    densities: Densities = None,
    learning_rate: Rate = None,
    examples: Annotated[int | None, typer.Option(help="Training examples of a task, at most.", min=2)] = None,
    tested: Annotated[int | None, typer.Option(help="Examples of a task to test on, at most.", min=2)] = None,
    seed: Annotated[int, typer.Option(help="Of heads, sampling and dropout.")] = 0,
    data_root: Root = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Pruning with a multitask objective (Xia and Shin 2021): eight settings, against single-task models at the same budget."""
    from secateur.cli.commands.multitask import load_encoder
    from secateur.reproduction.multitask import grid, report

    inputs.use_threads(threads)
    if preset not in ("builtin", "paper", "paper-nine"):
        raise InputError(f"preset: expected builtin, paper or paper-nine, got {preset!r}")
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
    run_cells(
        out, settings.to_json(), cells, laboratory.run,
        lambda rows: report.write(out, rows, settings, environment(encoder)), as_json,
    )  # fmt: skip


def _tasks(preset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those that are known, and those that are taken by default."""
    from secateur.reproduction.multitask import encoder_sets

    if preset == "builtin":
        return tuple(name for name in builtin.tasks() if name not in ("negation", "question")), BUILTIN_TASKS
    found = encoder_sets.THREE if preset == "paper" else encoder_sets.NINE
    return found, found


def _densities(given: str | None) -> dict[str, tuple[float, ...]] | None:
    if given is None:
        return None
    try:
        found = tuple(sorted({float(number) for number in given.split(",")}))
    except ValueError:
        raise InputError(f"densities: expected numbers between commas, got {given!r}") from None
    if not all(0 < density <= 1 for density in found):
        raise InputError(f"densities: expected shares in (0, 1], got {given!r}")
    return {"element": found, "rank": found}


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
    """The paper's, but short training on the built-in data, whose texts are short; for the built-in encoder, a fiftieth of
    BERT-base, also smaller densities and higher rates."""
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
    # Of each budget an equal share for each task, and twice that of the largest, for ensembles that share it unequally.
    single = {kind: (*(d / len(tasks) for d in found), min(1.0, 2 * found[-1] / len(tasks))) for kind, found in wanted.items()}
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
