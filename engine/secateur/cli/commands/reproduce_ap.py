"""`secateur reproduce ap`: the experiments of attribution-based pruning, as a resumable run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

import secateur
from secateur.attribution.criteria import criterion_named
from secateur.cli.shared import inputs, output
from secateur.cli.shared.options import Device, Json, Threads, UnitOption
from secateur.cli.shared.reproducing import run_cells
from secateur.data import builtin
from secateur.flow.loaded import Loaded, load_model
from secateur.reproduction.ap import glue, report
from secateur.reproduction.ap import grid as ap
from secateur.support.environment import environment
from secateur.support.errors import InputError

# Of each preset: its tasks, those that are looked at more closely, and a task with a related and an unrelated one.
BUILTIN = (("domain", "language", "movie", "qtype", "sentiment"), ("language", "domain"), ("sentiment", "movie", "language"))
PAPER = (("sst2", "mrpc", "boolq", "qnli", "cb", "rte"), ("sst2", "qnli"), ("qnli", "rte", "sst2"))

Out = Annotated[Path, typer.Option(help="Folder of the run. One that was begun with the same settings goes on.")]
Model = Annotated[str, typer.Option(help="An encoder-decoder that knows the tasks: folder, Hub name, or 'builtin'.")]
Preset = Annotated[str, typer.Option(help="builtin: built-in tasks; paper: GLUE and SuperGLUE sets from the Hub.")]
Tasks = Annotated[str | None, typer.Option(help="Some of the preset's tasks, between commas.")]
Experiments = Annotated[str | None, typer.Option(help=f"Some of {', '.join(ap.EXPERIMENTS)}, between commas.")]
Criteria = Annotated[str | None, typer.Option(help="Of the experiment on accuracy, between commas; svd is one too.")]
Sizes = Annotated[str, typer.Option(help="Examples of the low-resource experiment, between commas.")]
Root = Annotated[Path | None, typer.Option("--data-root", help="With --preset paper: ROOT/NAME/SPLIT.parquet, not the Hub.")]


def ap_(
    out: Out,
    model: Model = "builtin",
    preset: Preset = "builtin",
    tasks: Tasks = None,
    experiments: Experiments = None,
    criteria: Criteria = None,
    unit: UnitOption = "channel",
    examples: Annotated[int | None, typer.Option(help="Examples of a task to score on; paper: all.", min=2)] = None,
    tested: Annotated[int | None, typer.Option(help="Examples of a task to test on; paper: all.", min=2)] = None,
    sizes: Sizes = "10,100,1000",
    draws: Annotated[int, typer.Option(help="Draws of what is random.", min=1)] = 5,
    data_root: Root = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Attribution-based pruning (Yang et al. 2023): its six experiments, with its baselines and today's strong criteria."""
    inputs.use_threads(threads)
    if preset not in ("builtin", "paper"):
        raise InputError(f"preset: expected builtin or paper, got {preset!r}")
    known, detailed, unseen = BUILTIN if preset == "builtin" else PAPER
    chosen = inputs.among("tasks", tasks, known)
    found = inputs.among("experiments", experiments, ap.EXPERIMENTS)
    complete = set(unseen) <= set(chosen)
    if not complete and "unseen" in found:
        needed = f"the experiment on unseen domains needs the tasks {', '.join(unseen)}"
        if experiments is not None:
            raise InputError(f"tasks: {needed}, got {', '.join(chosen)}")
        output.say(f"{needed}: left out")
    loaded = load_model(model, task="text-to-text", device=device, dtype="auto")
    small = preset == "builtin"
    settings = ap.Settings(
        model=model,
        layers=_layers(loaded.model),
        tasks=chosen,
        detailed=tuple(task for task in detailed if task in chosen) or chosen[:1],
        unseen=unseen if complete else (),
        experiments=tuple(name for name in found if name != "unseen" or complete),
        criteria=ap.CRITERIA if criteria is None else _criteria(criteria),
        sizes=tuple(inputs.numbers(sizes, "sizes")),
        draws=draws,
        unit=inputs.unit(unit),
        examples=examples or (300 if small else None),
        tested=tested or (200 if small else None),
    )
    cells = ap.grid(settings)
    task_examples = {name: _task_examples(loaded, preset, name, settings, data_root) for name in chosen}
    laboratory = ap.Laboratory(loaded.model, task_examples, settings.unit, out / "scores")
    run_cells(
        out, settings.to_json(), cells, laboratory.run,
        lambda rows: report.write(out, rows, settings, environment(loaded.model)), as_json,
    )  # fmt: skip


def _task_examples(loaded: Loaded, preset: str, name: str, settings: ap.Settings, root: Path | None) -> ap.TaskExamples:
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
    found = secateur.sites(model)
    counts = [1 + max((site.layer for site in found if site.stack == stack), default=-1) for stack in ap.STACKS]
    if not all(counts):
        raise InputError("model: expected an encoder-decoder, got a model of one stack")
    return counts[0], counts[1]


def _criteria(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for name in chosen:
        if name != "svd":
            criterion_named(name)
    return chosen
