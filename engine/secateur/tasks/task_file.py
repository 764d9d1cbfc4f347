"""The names of the tasks, and secateur.json: the file in a model's folder that tells later commands its task."""

from __future__ import annotations

import json
from dataclasses import asdict

from secateur.support.errors import InputError
from secateur.tasks.base import Task
from secateur.tasks.causal import CausalLM
from secateur.tasks.image import ImageClassification
from secateur.tasks.sequence import SequenceClassification
from secateur.tasks.text_to_text import TextToText
from secateur.tasks.token import TokenClassification

TASK_FILE = "secateur.json"
_CLASSES: tuple[type[Task], ...] = (TextToText, SequenceClassification, TokenClassification, CausalLM, ImageClassification)
TASKS = {task_class.name: task_class for task_class in _CLASSES}


def name_of(task: Task) -> str:
    """Return the name of a task, a key of `TASKS`; empty for a task of another class."""
    return next((name for name, cls in TASKS.items() if type(task) is cls), "")


def task_file(task: Task) -> str:
    """Return the content of `TASK_FILE`: the name of the task, its labels, and its prompt if it has one.

    Raises:
        InputError: Later commands know no task of this class.
    """
    name = name_of(task)
    if not name:
        expected = ", ".join(cls.__name__ for cls in _CLASSES)
        raise InputError(f"task: expected one of {expected}, which a folder can name, got {type(task).__name__}")
    prompt = getattr(task, "prompt", None)
    return json.dumps({"task": name, "labels": task.labels, **({"prompt": asdict(prompt)} if prompt else {})}, indent=1) + "\n"
