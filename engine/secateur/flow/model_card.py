"""model_card: the README.md of a pruned folder, with the Hub's metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.flow.usage import Usage
from secateur.measuring.benchmark import COLUMNS
from secateur.measuring.compare import Comparison
from secateur.measuring.plots import machine, model_name
from secateur.planning.plan import Plan
from secateur.support.command import RUNNING
from secateur.support.hub import Base, base_of
from secateur.support.urls import redacted
from secateur.tasks import Task

CARD_FILE = "README.md"
_PIPELINES = {
    "text-to-text": "text2text-generation", "sequence-classification": "text-classification",
    "token-classification": "token-classification", "causal-lm": "text-generation",
    "image-classification": "image-classification",
}  # fmt: skip
_LISTED = 50  # The card lists this many labels.


@dataclass(frozen=True)
class Removed:
    """How many units of a kind were removed.

    Attributes:
        what: The kind of the units, such as "neurons".
        dense: Their number in the dense model.
        kept: Their number in the pruned model.
    """

    what: str
    dense: int
    kept: int


@dataclass(frozen=True)
class Making:
    """How a model was made smaller.

    Attributes:
        removed: What was removed.
        budget: The budget in words, "" for none.
        made_by: The command or the call that made the model, "" where it is not known.
        held_out: The name of the held-out examples, "" where it is not known.
        is_command: Whether `made_by` is a command line.
    """

    removed: Sequence[Removed]
    budget: str
    made_by: str
    held_out: str
    is_command: bool


def making_now(removed: Sequence[Removed], budget: str, made_by: str = "", held_out: str = "") -> Making:
    """Return how a model was made: by the command that runs now, if one runs, or else by the given call.

    Args:
        removed: What was removed.
        budget: The budget in words, "" for none.
        made_by: The call.
        held_out: The name of the call's held-out examples.
    """
    command = RUNNING.get()
    if command is None:
        return Making(removed, budget, made_by, held_out, is_command=False)
    return Making(removed, budget, command.line, name_of_data(command.held_out), is_command=True)


def removed_by(plan: Plan, blocks: int) -> list[Removed]:
    """Return the units that a plan removes, by their kind, and the blocks, of which the pruned model has `blocks` left."""
    units = list(dict.fromkeys(site.unit for site in plan.sites))
    removed = [Removed("blocks", blocks + len(plan.removed_blocks), blocks)] if plan.removed_blocks else []
    return removed + [
        Removed(
            f"{unit.replace('_', ' ')}s",
            sum(site.units for site in plan.sites if site.unit == unit),
            sum(len(plan[site.name]) for site in plan.sites if site.unit == unit),
        )
        for unit in units
    ]


def name_of_data(data: Any) -> str:
    """Return the name of examples for a card: a file's name, or a name on the Hub; "" for examples in memory."""
    if not isinstance(data, (str, Path)) or not str(data):
        return ""
    return Path(data).name if Path(data).exists() or isinstance(data, Path) else redacted(data)


def model_card(
    model: nn.Module, task: Task, usage: Usage, making: Making, comparison: Comparison, *, images: Sequence[str]
) -> str:
    """Return the text of a model card.

    Args:
        model: The pruned model.
        task: Its task.
        usage: How the folder is used.
        making: How the model was made.
        comparison: The evaluation, size and speed of the dense and the pruned model.
        images: The names of the folder's plots.

    Returns:
        Markdown with the Hub's metadata block.
    """
    from huggingface_hub import ModelCard

    config: Any = model.config
    base = base_of(str(getattr(config, "name_or_path", "") or ""))
    shown = base.name if isinstance(base.name, str) and not Path(base.name).is_dir() and _is_own(config, base) else ""
    sections = [
        f"# {_title(usage)}", *_about(shown or model_name(model), bool(shown), task, usage),
        "## What was removed", *_removal(making, comparison), *_plots(images, without="benchmark.png"),
        "## Quality", *_quality(making, comparison), "## Speed", *_speed(comparison), *_plots(images, only="benchmark.png"),
        "## How it was made", *_made(making, usage), "## How to use it", *_use(usage),
    ]  # fmt: skip
    text = f"---\n{_metadata(base, usage, making, comparison)}\n---\n\n" + "\n\n".join(sections) + "\n"
    return str(ModelCard(text))


def _title(usage: Usage) -> str:
    return Path(usage.folder).name or "model"


def _is_own(config: Any, base: Base) -> bool:
    """Whether the base's name is that of the dense model itself, and not of a model that the dense one was made from."""
    name = str(config.name_or_path)
    return base.name == name or f"models--{str(base.name).replace('/', '--')}" in name


def _metadata(base: Base, usage: Usage, making: Making, comparison: Comparison) -> str:
    """The metadata as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    pipeline = _PIPELINES.get(usage.task)
    metrics = comparison.evaluation["pruned"].metrics if comparison.evaluation else []
    data = making.held_out or "held-out examples"
    results = [
        EvalResult(
            task_type=pipeline or "other", dataset_type=data, dataset_name=data, metric_type=_slug(metric.metric),
            metric_name=metric.metric, metric_value=metric.value,
        )
        for metric in metrics
    ]  # fmt: skip
    return ModelCardData(
        base_model=base.name, library_name="transformers", pipeline_tag=pipeline, tags=["secateur", "pruned"],
        metrics=[_slug(metric.metric) for metric in metrics] or None, model_name=_title(usage),
        eval_results=results or None, **base.metadata,
    ).to_yaml()  # fmt: skip


def _slug(metric: str) -> str:
    """The name of a metric as the Hub writes names: "exact match" is "exact_match"."""
    return re.sub(r"\W+", "_", metric.lower())


def _about(name: str, on_hub: bool, task: Task, usage: Usage) -> list[str]:
    """What the model is, its task, labels and prompt."""
    link = f"[{name}](https://huggingface.co/{name})" if on_hub else f"`{name}`"
    what = usage.task or type(task).__name__
    text = [f"{link}, cut down to one task by secateur. The task: {what}."]
    if task.labels is not None:
        listed = ", ".join(f"`{label}`" for label in task.labels[:_LISTED])
        text.append(f"Labels ({len(task.labels)}): {listed}{', ...' if len(task.labels) > _LISTED else ''}.")
    elif not task.labels_from_model:
        text.append("Targets are open.")
    prompt = getattr(task, "prompt", None)
    if prompt is not None:
        text.append("The text around each input is in `secateur.json`: `" + _one_line(prompt) + "`.")
    return text


def _one_line(prompt: Any) -> str:
    return json.dumps({name: value for name, value in vars(prompt).items() if value}, ensure_ascii=False)


def _removal(making: Making, comparison: Comparison) -> list[str]:
    """The table of units and parameters, and the budget."""
    sizes = comparison.parameters
    rows = [*making.removed, Removed("parameters", sizes["dense"], sizes["pruned"])]
    table = _table(
        ("", "dense", "pruned", "removed"),
        [(r.what, f"{r.dense:,}", f"{r.kept:,}", f"{1 - r.kept / r.dense:.1%}") for r in rows],
    )
    return [table, *([f"Budget: {making.budget}."] if making.budget else [])]


def _quality(making: Making, comparison: Comparison) -> list[str]:
    """The metrics of both models with their intervals."""
    if not comparison.evaluation:
        return ["No held-out examples were given, so neither model was evaluated."]
    dense, pruned = (comparison.evaluation[name] for name in ("dense", "pruned"))
    rows = [
        (one.metric, *(f"{e.value:.4f} ({e.low:.4f} to {e.high:.4f})" for e in (one, two)))
        for one, two in zip(dense.metrics, pruned.metrics, strict=True)
    ]
    data = f"`{making.held_out}`" if making.held_out else "held-out examples"
    return [
        f"On {data}, n = {pruned.examples}. In brackets: 95% intervals.", _table(("", "dense", "pruned"), rows),
    ]  # fmt: skip


def _speed(comparison: Comparison) -> list[str]:
    """The timings, where they were measured, and why they fall short."""
    report, where = comparison.benchmark, comparison.benchmark.environment
    notes = "\n".join(f"- {note}" for note in report.notes)
    versions = f"torch {where['torch']}, transformers {where['transformers']}"
    return [
        f"Measured on {machine(where)}; processor: {where['processor']}; {versions}. Medians of forward passes in turn.",
        _table(COLUMNS, list(report.cells())), *([notes] if notes else []),
    ]  # fmt: skip


def _made(making: Making, usage: Usage) -> list[str]:
    """The command or the call, and the file of its options where the folder has it: where it is the command's output."""
    if not making.made_by:
        return ["The call was not recorded."]
    block = f"```{'sh' if making.is_command else 'python'}\n{making.made_by}\n```"
    repeat = "`run.yaml` holds all options: `secateur COMMAND --config run.yaml --out OTHER` repeats the run."
    command = RUNNING.get()
    has_run_file = making.is_command and command is not None and command.makes(Path(usage.folder))
    return [block, *([repeat] if has_run_file else []), "`report.json` holds all figures."]


def _use(usage: Usage) -> list[str]:
    """How to load, score and serve."""
    python = "```python\n" + "\n".join(usage.python()) + "\n```"
    command = usage.command()
    place = f"`{usage.folder}` stands for the path of this folder."
    if usage.auto_class:
        place += " transformers also takes its name on the Hub."
    serve = usage.serving()
    export = [f"For another engine (ONNX, OpenVINO and others):\n\n```sh\n{usage.export()}\n```"] if usage.export() else []
    scores = [f"```sh\n{command}\n```"] if command else []
    return [place, python, *scores, *export, f"Serving: {serve[0].lower()}{serve[1:]}"]


def _plots(images: Sequence[str], *, only: str = "", without: str = "") -> list[str]:
    """The plots as images of the card."""
    chosen = [name for name in images if (not only or name == only) and name != without]
    return [f"![{name.removesuffix('.png')}]({name})" for name in chosen]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
