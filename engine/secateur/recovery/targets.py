"""Targets: what a dense model has behind each branch, which a pruned model shall have again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.examples import Examples
from secateur.model.branches import Branch
from secateur.model.families import branches
from secateur.recovery.walk import Streams, Walk
from secateur.tasks import Batch, Task
from secateur.tasks.base import require_fit
from secateur.tasks.batches import model_device

HELD = 2 << 30  # Bytes of states that are held in memory. More are computed anew where they are needed.


class Targets:
    """The dense model's residual stream behind each branch, for some examples.

    They serve the refits of any number of models that are pruned from it: the first use runs the dense model once.

    Attributes:
        model: The dense model.
        task: The task.
        batches: The examples in batches.
        examples: The number of examples.
    """

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Batch], examples: int) -> None:
        self.model, self.task, self.batches, self.examples = model, task, batches, examples
        self._held: list[dict[str, Tensor]] = []
        self._walk: Walk | None = None

    def start(self) -> None:
        """Get ready for the branches from the first one on. The model must be `undisturbed` from here on."""
        if not self._held and self._walk is None:
            self._held = [_behind(self.model, self.task, self.batches[0])]
            size = sum(tensor.nbytes for tensor in self._held[0].values())
            if size * len(self.batches) <= HELD:
                self._held += [_behind(self.model, self.task, batch) for batch in self.batches[1:]]
        if len(self._held) < len(self.batches):
            self._held, self._walk = [], Walk(self.model, self.task, self.batches)

    def behind(self, k: int, branch: Branch) -> Tensor:
        """Return what batch k has behind a branch [B, T, channels]. Branches come in their order, each with every batch."""
        return self._walk.reach(k, branch).behind if self._walk is not None else self._held[k][branch.name]


def targets_of(model: nn.Module, task: Task, examples: Examples, *, unlabeled: bool = False, max_tokens: int = 4096) -> Targets:
    """Return the targets for some examples.

    Args:
        model: The dense model.
        task: The task.
        examples: The examples, as in `recover_`.
        unlabeled: As in `recover_`.
        max_tokens: As in `recover_`.

    Raises:
        InputError: The examples are unusable, or the model does not fit the task.
    """
    require_fit(task, model)
    rows = task.read(examples, all_labels=unlabeled)
    items = task.items(model, rows, all_labels=unlabeled)
    return Targets(model, task, list(task.batches(items, model_device(model), max_tokens)), len(rows))


def _behind(model: nn.Module, task: Task, batch: Batch) -> dict[str, Tensor]:
    """Run a whole pass. Returns by branch what `Reached.behind` is."""
    streams, found = Streams(model), dict[str, Tensor]()

    def put(branch: Branch, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if branch.name not in found:
            found[branch.name] = streams.reached(branch, arguments[0], output).behind
            streams.add(branch, output)

    with ExitStack() as stack, torch.no_grad():
        for branch in branches(model).values():
            stack.enter_context(streams.reading(branch))
            handle = model.get_submodule(branch.output).register_forward_hook(partial(put, branch), prepend=True)
            stack.callback(handle.remove)
        task.logits(model, batch)
    return found
