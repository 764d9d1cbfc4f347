"""What the folder of a pruned model tells of its making: the dense model, and the plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur.flow.loaded import Loaded, load_model
from secateur.measuring.plots import model_name, widths_plot
from secateur.model.blocks import blocks
from secateur.planning.plan import Plan
from secateur.support.command import RUN_FILE
from secateur.support.errors import InputError, reading
from secateur.support.fields import read_object
from secateur.support.hub import base_of
from secateur.support.yaml_files import read_yaml

PLAN_FILE = "plan.json"


def plan_files(plan: Plan, model: nn.Module, task_name: str) -> dict[str, str | bytes]:
    """Return the files that tell a model's plan, by name: the plan, and a plot of the widths.

    Args:
        plan: The plan.
        model: The model.
        task_name: The name of the task, for the title.
    """
    title = f"{model_name(model)}, {task_name}: what each layer keeps"
    return {PLAN_FILE: plan.dumps(), "widths.png": widths_plot(plan, title)}


def dense_name(folder: str | Path) -> str:
    """Return the name of the dense model that a folder was made from: a folder, a Hub name or "builtin".

    Its run.yaml tells it, or else its model card.

    Args:
        folder: The folder.

    Raises:
        InputError: Neither does.
    """
    file = Path(folder) / RUN_FILE
    options: Any = read_yaml(file, "model") if file.is_file() else {}
    if isinstance(options, dict) and options.get("model"):
        if options.get("command") != "heal":
            return str(options["model"])
        return str(options.get("teacher") or dense_name(str(options["model"])))
    name = base_of(str(folder)).name
    if name is None:
        raise InputError(f"teacher: expected the dense model that {str(folder)!r} was made from, got none: give --teacher")
    return name


def load_teacher(name: str, student: Loaded, *, device: str, dtype: str) -> nn.Module:
    """Load the dense model of a pruned one.

    Args:
        name: A folder, a Hub name or "builtin".
        student: The pruned model.
        device: As in `load_model`.
        dtype: As in `load_model`.

    Raises:
        InputError: It cannot be loaded, or its tokenizer has another vocabulary than the pruned model's.
    """
    try:
        teacher = load_model(name, task=student.task, device=device, dtype=dtype)
    except InputError as error:
        raise InputError(f"teacher: {str(error).removeprefix('model: ')}") from error
    if _vocabulary(teacher.tokenizer) != _vocabulary(student.tokenizer):
        raise InputError(f"teacher: expected the pruned model's tokenizer, got one with another vocabulary in {name!r}")
    return teacher.model


def plan_in(folder: str | Path) -> Plan | None:
    """Return the plan in a folder, None where there is none. Raises InputError for a damaged one."""
    file = Path(folder) / PLAN_FILE
    return Plan.load(file) if file.is_file() else None


def removed_in(folder: str | Path, pruned: nn.Module, dense: nn.Module) -> Sequence[str]:
    """Return the blocks of the dense model that the folder's model lacks, as its plan or its report names them.

    Args:
        folder: The folder.
        pruned: Its model.
        dense: The dense model.

    Raises:
        InputError: A file is damaged.
    """
    plan, file = plan_in(folder), Path(folder) / "report.json"
    if plan is not None:
        return plan.removed_blocks
    known = blocks(dense)
    if len(blocks(pruned)) == len(known) or not file.is_file():
        return ()
    with reading("model", file, "is no report"):
        return [name for name in read_object(file).get("deleted", []) if name in known]


def _vocabulary(reader: Any) -> Any:
    """Return what a tokenizer makes of words, None for an image processor."""
    return reader.get_vocab() if hasattr(reader, "get_vocab") else None
