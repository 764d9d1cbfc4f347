"""Walk: a forward pass over many batches, branch by branch. All batches reach one branch before any reaches the next."""

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
    """The forward pass has reached the branch, and the rest of it is not needed."""


class Walk:
    """A forward pass of many batches through a model whose out-projections may change after they are reached.

    Modules before a branch are computed once, with the weights that they had when the next branch was reached. Later the
    largest modules whose linear layers all belong to earlier branches return their stored outputs. Branches must be reached in
    their order, each by every batch.
    """

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> None:
        self._model, self._task, self._batches = model, task, batches
        of_model = branches(model).values()
        self._number = {branch.name: k for k, branch in enumerate(of_model)}
        self._last: dict[str, float] = {}  # By path of a module, the number of the last branch that it holds a linear layer of.
        for k, branch in enumerate(of_model):
            for linear in branch.linears:
                own = k if linear == branch.output else k - 0.5  # In-projections do not change.
                self._last |= dict.fromkeys(prefixes(linear), own)
        self._returned: list[dict[str, Any]] = [{} for _ in batches]

    def reach(self, k: int, branch: Branch) -> tuple[Tensor, Tensor]:
        """Return the input [B, T, inputs] and the output [B, T, outputs] of the branch's out-projection in batch k."""
        seen: list[tuple[Tensor, Tensor]] = []
        returned = self._returned[k]
        complete = [path for path, last in self._last.items() if last < self._number[branch.name]]

        def reached(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            seen.append((arguments[0], output))
            raise _Reached

        def store(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            returned[path] = output
            for inner in [other for other in returned if other.startswith(f"{path}.")]:
                del returned[inner]  # It is inside a stored module and not called again.

        with ExitStack() as stack:
            stack.enter_context(replaced(self._model, {path: _recall(value) for path, value in returned.items()}))
            for path in complete:
                if path not in returned:
                    module = self._model.get_submodule(path)
                    stack.callback(module.register_forward_hook(partial(store, path)).remove)
            handle = self._model.get_submodule(branch.output).register_forward_hook(reached, prepend=True)
            stack.callback(handle.remove)
            with suppress(_Reached), torch.no_grad():
                self._task.logits(self._model, self._batches[k])
        return seen[0]


def _recall(value: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: value
