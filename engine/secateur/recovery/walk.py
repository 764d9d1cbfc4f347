"""Walk: a forward pass over many batches, branch by branch. All batches reach one branch before any reaches the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.branches import Branch
from secateur.model.families import branches, family_of
from secateur.model.hooks import replaced
from secateur.model.paths import prefixes
from secateur.model.sites import Stack
from secateur.tasks import Batch, Task


class _Reached(Exception):
    """The forward pass has reached the branch, and the rest of it is not needed."""


@dataclass(frozen=True)
class Reached:
    """What a batch brings to a branch.

    Attributes:
        inputs: [B, T, inputs], the inputs of the out-projection.
        outputs: [B, T, channels], its outputs.
        stream: [B, T, channels], the residual stream that the branch adds to, without the embeddings where a sum of branches
            gives it; None where a norm stands between the out-projection and the stream (Gemma). It is float32 at least.
    """

    inputs: Tensor
    outputs: Tensor
    stream: Tensor | None


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
        family = family_of(model)
        self._post_norm = family.post_norm(model.config)
        # Out-projections whose outputs are added to the stream as they are, and the sums of the outputs so far.
        self._adds = {of.output: of.stack for of in of_model if family.contribution(model, of).path == of.output}
        self._added: list[dict[Stack, Tensor]] = [{} for _ in batches]

    def reach(self, k: int, branch: Branch) -> Reached:
        """Run batch k up to the branch's out-projection."""
        seen: list[tuple[Tensor, Tensor]] = []
        read: list[Tensor] = []
        returned, added = self._returned[k], self._added[k]
        complete = [path for path, last in self._last.items() if last < self._number[branch.name]]

        def reached(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            seen.append((arguments[0], output))
            raise _Reached

        def reads(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            read.append(arguments[0] if arguments else options["hidden_states"])

        def store(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            returned[path] = output
            if path in self._adds:  # Only the first pass behind the branch computes it, so it is added once.
                before = added.get(self._adds[path])
                added[self._adds[path]] = _wide(output) if before is None else before + output.view_as(before)
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
            if self._post_norm:  # The branch reads the stream itself.
                stack.callback(self._model.get_submodule(branch.path).register_forward_pre_hook(reads, with_kwargs=True).remove)
            with suppress(_Reached), torch.no_grad():
                self._task.logits(self._model, self._batches[k])
        inputs, outputs = seen[0]
        if branch.output not in self._adds:
            return Reached(inputs, outputs, None)
        if self._post_norm:
            return Reached(inputs, outputs, _wide(read[0]).view_as(outputs))  # OPT reads all tokens in one row.
        return Reached(inputs, outputs, added[branch.stack] if branch.stack in added else torch.zeros_like(_wide(outputs)))


def _wide(values: Tensor) -> Tensor:
    """Values in float32 at least, in which sums are exact enough."""
    return values if values.dtype == torch.float64 else values.float()


def _recall(value: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: value
