"""Walk: a forward pass over many batches, branch by branch. All batches reach one branch before any reaches the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.model.blocks import blocks
from secateur.model.branches import Branch, FeedForward
from secateur.model.families import branches, family_of
from secateur.model.hooks import replaced, returning
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

    @property
    def behind(self) -> Tensor:
        """[B, T, channels], the stream behind the branch; its outputs alone where a norm follows them."""
        return self.outputs if self.stream is None else self.stream + self.outputs


class Streams:
    """The residual streams of one pass, up to the branches that have run."""

    def __init__(self, model: nn.Module) -> None:
        family = family_of(model)
        self._model, self._post_norm = model, family.post_norm(model.config)
        # Out-projections whose outputs are added to the stream as they are, and the sums of the outputs so far.
        self._adds = {of.output for of in branches(model).values() if family.contribution(model, of).path == of.output}
        self._added: dict[Stack, Tensor] = {}
        self._read: dict[str, Tensor] = {}

    def add(self, branch: Branch, output: Tensor) -> None:
        """Add what a branch gives, once for each branch."""
        if branch.output in self._adds and not self._post_norm:
            before = self._added.get(branch.stack)
            self._added[branch.stack] = _wide(output) if before is None else before + output.view_as(before)

    @contextmanager
    def reading(self, branch: Branch) -> Iterator[None]:
        """A context in which the stream in front of a branch is seen where the branch reads the stream itself."""

        def reads(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            self._read[branch.name] = arguments[0] if arguments else options["hidden_states"]

        with ExitStack() as stack:
            if self._post_norm:
                path = self._model.get_submodule(branch.path)
                stack.callback(path.register_forward_pre_hook(reads, with_kwargs=True).remove)
            yield

    def reached(self, branch: Branch, inputs: Tensor, outputs: Tensor) -> Reached:
        """Return the inputs and outputs of a branch with the stream in front of it."""
        stream: Tensor | None = None
        if branch.output in self._adds and self._post_norm:
            stream = _wide(self._read.pop(branch.name)).view_as(outputs)  # OPT reads all tokens in one row.
        elif branch.output in self._adds:
            stream = self._added[branch.stack] if branch.stack in self._added else torch.zeros_like(_wide(outputs))
        return Reached(inputs, outputs, stream)


class Walk:
    """A forward pass of many batches through a model whose layers may change after they are reached.

    Modules before a branch are computed once, with the weights that they had when the next branch was reached. Later the
    largest modules whose linear layers all belong to earlier branches return their stored outputs. Branches must be reached in
    their order, each by every batch.

    Of the blocks that have run, the states behind the last one of each stack are held, since a block reads what the one before
    it gives. So a padded token takes at most itemsize * (channels of each stack + 2 * channels + outputs of the in-projections
    of one branch) bytes, and another 4 * channels for the stream of each stack. T5 adds the position biases of a stack.
    """

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> None:
        self.model, self._task, self._batches = model, task, batches
        of_model = branches(model).values()
        self._number = {branch.name: k for k, branch in enumerate(of_model)}
        self._last: dict[str, float] = {}  # By path of a module, the number of the last branch that it holds a linear layer of.
        for k, branch in enumerate(of_model):
            for linear in branch.linears:
                own = k if linear == branch.output else k - 0.5  # In-projections do not change after `reach`.
                self._last |= dict.fromkeys(prefixes(linear), own)
        self._returned: list[dict[str, Any]] = [{} for _ in batches]
        of_blocks = list(blocks(model).values())
        self._earlier = {
            block.path: [other.path for other in of_blocks[:number] if other.stack == block.stack]
            for number, block in enumerate(of_blocks)
        }
        self._outputs = {branch.output: branch for branch in of_model}
        self._streams = [Streams(model) for _ in batches]

    def reach(self, k: int, branch: Branch) -> Reached:
        """Run batch k up to the branch's out-projection."""
        seen: list[tuple[Tensor, Tensor]] = []

        def reached(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            seen.append((arguments[0], output))
            raise _Reached

        with self._streams[k].reading(branch):
            out_projection = self.model.get_submodule(branch.output)
            self._run(k, self._number[branch.name], out_projection.register_forward_hook(reached, prepend=True))
        return self._streams[k].reached(branch, *seen[0])

    def enter(self, k: int, branch: FeedForward) -> Tensor:
        """Run batch k up to the branch's in-projections, which may change until `reach`. Returns what they read [B, T, c]."""
        seen: list[Tensor] = []

        def reached(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])
            raise _Reached

        first = self.model.get_submodule(branch.path)
        self._run(k, self._number[branch.name] - 0.5, first.register_forward_pre_hook(reached, prepend=True))
        return seen[0]

    def _run(self, k: int, before: float, stop: RemovableHandle) -> None:
        """Run batch k up to a hook that raises `_Reached`. Modules whose linear layers come before a number run for good."""
        returned, streams = self._returned[k], self._streams[k]
        complete = [path for path, last in self._last.items() if last < before]

        def store(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            returned[path] = output
            if path in self._outputs:  # Only the first pass behind a branch computes its outputs again.
                streams.add(self._outputs[path], output)
            for inner in [other for other in returned if other.startswith(f"{path}.")]:
                del returned[inner]  # It is inside a stored module and not called again.
            returned.update(dict.fromkeys(self._earlier.get(path, ()), output))  # Frees theirs, which no block reads any more.

        with ExitStack() as stack:
            stack.enter_context(replaced(self.model, {path: returning(value) for path, value in returned.items()}))
            for path in complete:
                if path not in returned:
                    module = self.model.get_submodule(path)
                    stack.callback(module.register_forward_hook(partial(store, path)).remove)
            stack.callback(stop.remove)
            with suppress(_Reached), torch.no_grad():
                self._task.logits(self.model, self._batches[k])


def _wide(values: Tensor) -> Tensor:
    """Values in float32 at least, in which sums are exact enough."""
    return values if values.dtype == torch.float64 else values.float()
