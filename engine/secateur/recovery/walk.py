"""A forward pass over many batches, branch by branch: all batches reach one branch before any goes on to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.branches import Branch
from secateur.model.families import branches
from secateur.model.hooks import replaced
from secateur.model.paths import prefixes
from secateur.tasks import Batch, Task


class _Reached(Exception):
    """The forward pass has come to where it is needed."""


class Walk:
    """The batches' way through a model, whose out-projections may change once they have been reached.

    What lies before a branch is computed once, with the weights that it had when the next branch was reached: the largest
    modules whose linear layers all belong to earlier branches return what they returned. The branches must be reached in their
    order, each by every batch.
    """

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> None:
        self._model, self._task, self._batches = model, task, batches
        found = branches(model).values()
        self._number = {branch.name: k for k, branch in enumerate(found)}
        self._last: dict[str, float] = {}  # Each module that holds linear layers of branches, with the last such branch.
        for k, branch in enumerate(found):
            for linear in branch.linears:
                own = k if linear == branch.output else k - 0.5  # The in-projections stay as they are.
                self._last |= dict.fromkeys(prefixes(linear), own)
        self._returned: list[dict[str, Any]] = [{} for _ in batches]

    def reach(self, k: int, branch: Branch) -> tuple[Tensor, Tensor]:
        """What the branch's out-projection reads in batch k [B, T, inputs], and what it returns [B, T, outputs]."""
        seen: list[tuple[Tensor, Tensor]] = []
        returned = self._returned[k]
        complete = [path for path, last in self._last.items() if last < self._number[branch.name]]

        def reached(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            seen.append((arguments[0], output))
            raise _Reached

        def work(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            returned[path] = output
            for inner in [other for other in returned if other.startswith(f"{path}.")]:
                del returned[inner]  # Never asked for again.

        with ExitStack() as stack:
            stack.enter_context(replaced(self._model, {path: _recall(value) for path, value in returned.items()}))
            for path in complete:
                if path not in returned:
                    module = self._model.get_submodule(path)
                    stack.callback(module.register_forward_hook(partial(work, path)).remove)
            handle = self._model.get_submodule(branch.output).register_forward_hook(reached, prepend=True)
            stack.callback(handle.remove)
            with suppress(_Reached), torch.no_grad():
                self._task.logits(self._model, self._batches[k])
        return seen[0]


def _recall(value: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: value
