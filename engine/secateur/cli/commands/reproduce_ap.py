"""`secateur reproduce ap`: repeat the experiments of attribution-based pruning, as a resumable run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

import secateur
from secateur.attribution.criteria import criterion_named
from secateur.cli.shared import inputs, output
from secateur.cli.shared.options import Device, Json, RunFolder, Threads, UnitOption
from secateur.cli.shared.reproducing import run_cells
from secateur.cli.shared.unused import require_unused
from secateur.data import builtin
from secateur.flow.loaded import Loaded, load_model
from secateur.model.offloading import weights_digest
from secateur.reproduction.ap import glue, report
from secateur.reproduction.ap import grid as ap
from secateur.support.environment import environment
from secateur.support.errors import InputError
from secateur.support.files import require_run_folder
from secateur.support.ledger import ROWS, content_hash
from secateur.tasks.fitting import reader_digest

# For each preset: its tasks, the tasks of the detailed experiments, and a task with a related and an unrelated one.
BUILTIN = (("domain", "language", "movie", "qtype", "sentiment"), ("language", "domain"), ("sentiment", "movie", "language"))
PAPER = (("sst2", "mrpc", "boolq", "qnli", "cb", "rte"), ("sst2", "qnli"), ("qnli", "rte", "sst2"))

Model = Annotated[str, typer.Option(help="An encoder-decoder that knows the tasks: a folder, a Hub name, or 'builtin'.")]
Preset = Annotated[str, typer.Option(help="Data: builtin (built-in tasks) or paper (GLUE and SuperGLUE sets from the Hub).")]
Tasks = Annotated[str | None, typer.Option(help="Some of the preset's tasks, separated by commas; by default, all.")]
Experiments = Annotated[
    str | None, typer.Option(help=f"Some of {', '.join(ap.EXPERIMENTS)}, separated by commas; by default, all.")
]
Criteria = Annotated[
    str | None, typer.Option(help="Criteria of the accuracy experiment, separated by commas; svd is allowed too.")
]
Sizes = Annotated[str, typer.Option(help="Numbers of examples in the low-resource experiment, separated by commas.")]
Root = Annotated[
    Path | None, typer.Option("--data-root", help="With --preset paper: read ROOT/NAME/SPLIT.parquet instead of the Hub.")
]


@output.resumes
def ap_(
    out: RunFolder,
    model: Model = "builtin",
    preset: Preset = "builtin",
    tasks: Tasks = None,
    experiments: Experiments = None,
    criteria: Criteria = None,
    unit: UnitOption = "channel",
    examples: Annotated[
        int | None, typer.Option(help="Examples of a task to score on; by default, 300, or all with --preset paper.", min=2)
    ] = None,
    tested: Annotated[
        int | None, typer.Option(help="Examples of a task to test on; by default, 200, or all with --preset paper.", min=2)
    ] = None,
    sizes: Sizes = "10,100,1000",
    draws: Annotated[int, typer.Option(help="Repetitions of random choices, with other seeds.", min=1)] = 5,
    data_root: Root = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Repeat the six experiments of attribution-based pruning (Yang et al. 2023), with its baselines and newer criteria."""
    inputs.use_threads(threads)
    require_run_folder(out)
    if preset not in ("builtin", "paper"):
        raise InputError(f"preset: expected builtin or paper, got {preset!r}")
    if preset == "builtin":
        require_unused("with --preset builtin", data_root=(data_root, None))
    known, detailed, unseen = BUILTIN if preset == "builtin" else PAPER
    wanted_tasks = inputs.among("tasks", tasks, known)
    wanted_experiments = inputs.among("experiments", experiments, ap.EXPERIMENTS)
    complete = set(unseen) <= set(wanted_tasks)
    if not complete and "unseen" in wanted_experiments:
        needed = f"the experiment on unseen domains needs the tasks {', '.join(unseen)}"
        if experiments is not None:
            raise InputError(f"tasks: {needed}, got {', '.join(wanted_tasks)}")
        output.say(f"{needed}: left out")
    loaded = load_model(model, task="text-to-text", device=device, dtype="auto")
    built_in = preset == "builtin"
    settings = ap.Settings(
        model=model,
        layers=_layers(loaded.model),
        tasks=wanted_tasks,
        detailed=tuple(task for task in detailed if task in wanted_tasks) or wanted_tasks[:1],
        unseen=unseen if complete else (),
        experiments=tuple(name for name in wanted_experiments if name != "unseen" or complete),
        criteria=ap.CRITERIA if criteria is None else _criteria(criteria),
        sizes=tuple(inputs.numbers(sizes, "sizes")),
        draws=draws,
        unit=inputs.unit(unit),
        examples=examples or (300 if built_in else None),
        tested=tested or (200 if built_in else None),
    )
    cells = ap.grid(settings)
    task_examples = {name: _task_examples(loaded, preset, name, settings, data_root) for name in wanted_tasks}
    laboratory = ap.Laboratory(loaded.model, task_examples, settings.unit, out / "scores")
    rows = {name: [data.pool, data.test] for name, data in task_examples.items()}
    identity = {
        "weights": weights_digest(loaded.model), "tokenizer": reader_digest(loaded.tokenizer), ROWS: content_hash(rows),
    }  # fmt: skip
    run_cells(
        out, {**settings.to_json(), **identity}, cells, laboratory.run,
        lambda rows: report.write(out, rows, settings, environment(loaded.model)), as_json, ap.RESULTS,
    )  # fmt: skip


def _task_examples(loaded: Loaded, preset: str, name: str, settings: ap.Settings, root: Path | None) -> ap.TaskExamples:
    """The task, its examples to score on, and its examples to test on."""
    if preset == "builtin":
        pool, test = builtin.examples(name), builtin.examples(f"{name}.test")
    else:
        pool, test = glue.examples(name, "train", root), glue.examples(name, "validation", root)
    labels = sorted({row["target"] for row in pool}) if preset == "builtin" else list(glue.SETS[name].labels)
    task = secateur.TextToText(loaded.tokenizer, labels=labels, max_length=512)
    if name in settings.detailed and "low-resource" in settings.experiments and max(settings.sizes) > len(pool):
        raise InputError(f"sizes: expected at most {len(pool)}, the examples of {name}, got {max(settings.sizes)}")
    return ap.TaskExamples(task, pool, settings.examples, test[: settings.tested])


def _layers(model: nn.Module) -> tuple[int, int]:
    """The layers of the encoder and of the decoder."""
    prunable = secateur.sites(model)
    counts = [1 + max((site.layer for site in prunable if site.stack == stack), default=-1) for stack in ap.STACKS]
    if not all(counts):
        raise InputError("model: expected an encoder-decoder, got a model of one stack")
    return counts[0], counts[1]


def _criteria(text: str) -> tuple[str, ...]:
    """Parse names of criteria."""
    chosen = tuple(text.split(","))
    for name in chosen:
        if name != "svd":
            criterion_named(name)
    return chosen
