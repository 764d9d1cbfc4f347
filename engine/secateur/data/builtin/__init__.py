"""The built-in model and data: a small multi-task T5, with calibration and test examples of its tasks. See NOTICE."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.support.errors import InputError

_HERE = Path(__file__).parent
# What the built-in model was trained to be asked with. The built-in examples have it already.
_PROMPTS = {
    "domain": "domain: {input}",
    "language": "language: {input}",
    "movie": "movie review: {input}",
    "negation": "negate: {input}",
    "qtype": "question type: {input}",
    "question": "ask: {input}",
    "sentiment": "sentiment: {input}",
}
MODEL = _HERE / "model"


def tasks() -> list[str]:
    """Return the names of the built-in tasks, sorted."""
    return sorted({path.name.partition(".")[0] for path in (_HERE / "tasks").glob("*.jsonl.gz")})


def examples(name: str) -> list[dict[str, Any]]:
    """Read the examples of a built-in task.

    Args:
        name: "TASK" or "TASK.calibration" for the examples to score units on; "TASK.test" for the examples to evaluate on.

    Raises:
        InputError: There is no such task or split.
    """
    task, _, split = name.partition(".")
    path = _HERE / "tasks" / f"{task}.{split or 'calibration'}.jsonl.gz"
    if not path.exists():
        raise _unknown(name)
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()]


def prompt(name: str) -> str:
    """Return the text around an input of a built-in task, with {input} in its place.

    Args:
        name: As in `examples`.

    Raises:
        InputError: There is no such task.
    """
    task = name.partition(".")[0]
    if task not in _PROMPTS:
        raise _unknown(name)
    return _PROMPTS[task]


def _unknown(name: str) -> InputError:
    """The error for examples that are not built in."""
    return InputError(f"data: expected builtin:TASK or builtin:TASK.test with TASK one of {', '.join(tasks())}, got {name!r}")


def load() -> tuple[nn.Module, Any]:
    """Load the built-in model, in float32 and in eval mode, and its tokenizer."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model: nn.Module = AutoModelForSeq2SeqLM.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=False)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
