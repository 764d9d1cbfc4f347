"""Pruned models and examples that healing is tested with."""

from __future__ import annotations

from typing import Any

from cases import Case, sentences, uniform_plan
from torch import Tensor, nn

import secateur

# The three kinds of models.
NAMES = ("t5-gated", "bert-sequence", "llama")


def rows_of(case: Case, count: int = 40) -> list[dict[str, Any]]:
    """Return more examples of a case, with the targets of its own in turn."""
    rows = [dict(case.examples[k % len(case.examples)]) for k in range(count)]
    if "input" in rows[0]:
        for row, text in zip(rows, sentences(count), strict=True):
            row["input"] = text
    return rows


def pruned_of(case: Case, model: nn.Module, keep: float = 0.5) -> nn.Module:
    """Return a model that keeps a share of all units, with heads as units."""
    return secateur.prune(model, uniform_plan(case, "head", keep=keep))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
