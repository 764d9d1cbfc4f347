"""What `compress` spends: products of linear layers, in forward passes of the dense model over the calibration examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, CLASSES, LABELS, WORDS, Case
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.pytorch_utils import Conv1D

import secateur
from secateur.flow.effort import EFFORTS, Effort

# Forward passes at most, as docs/how-it-works.md says. A backward pass counts as one: weights get no gradients.
MOST = {"low": 8, "default": 20, "high": 40}


class Products:
    """Counts the multiply-adds of all linear layers. The products of a backward pass count too."""

    def __enter__(self) -> Products:
        self.count = 0.0
        self._handle = register_module_forward_hook(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _add(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if isinstance(module, (nn.Linear, Conv1D)) and isinstance(output, Tensor):
            self.count += (2 if output.requires_grad else 1) * arguments[0].numel() * output.shape[-1]


def examples_of(case: Case, count: int) -> list[dict[str, Any]]:
    """Return examples with different texts."""
    targets = CLASSES if case.name == "bert-sequence" else LABELS
    pairs = [f"{first} {second}" for first in WORDS for second in WORDS]
    return [{"input": text, "target": targets[k % len(targets)]} for k, text in enumerate(pairs[:count])]


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", ["bert-sequence", "t5-gated", "llama"])
def test_an_effort_costs_no_more_passes_than_stated(name: str, effort: Effort) -> None:
    case = CASES[name]
    model, rows = case.model(), examples_of(case, 300)
    task = case.make_task()
    with Products() as whole, torch.no_grad():
        for batch in task.batches(task.items(model, rows), torch.device("cpu"), 4096):
            task.logits(model, batch)
    with Products() as spent:
        secateur.compress(model, rows, task, flops=0.5, effort=effort, align=1, batch_sizes=(1,), lengths=(8,))
    passes = spent.count / whole.count
    assert passes <= MOST[effort]
    assert passes > 4  # Scoring alone takes two, and the refit of the chosen plan two.
