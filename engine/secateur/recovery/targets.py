"""Targets: what a dense model has behind and in its branches, which a pruned model shall have again."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.examples import Examples
from secateur.model.branches import Branch, FeedForward, feed_forwards
from secateur.model.families import branches
from secateur.recovery.walk import Streams
from secateur.support.errors import InputError
from secateur.tasks import Batch, Task
from secateur.tasks.base import require_fit
from secateur.tasks.batches import model_device

HELD = 2 << 30  # Bytes of states that are held in memory. More go to files.


class Targets:
    """The dense model's residual stream behind each branch, and what feed-forwards read, for some examples.

    They serve the refits of any number of models that are pruned from it: the first use runs the dense model once. They take
    4 bytes (8 in a float64 model) for each branch, padded token and channel, and for each feed-forward the bytes of what it
    reads. More than `HELD` bytes go to files in the folder for temporary files (TMPDIR), which are mapped to memory, and are
    deleted with this object.

    Attributes:
        model: The dense model.
        task: The task.
        batches: The examples in batches.
        examples: The number of examples.
    """

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Batch], examples: int) -> None:
        self.model, self.task, self.batches, self.examples = model, task, batches, examples
        self._held: list[dict[str, Tensor]] = []
        self._folder: Path | None = None

    def start(self) -> None:
        """Get ready for `behind`. The model must be `undisturbed`. Raises InputError where the disk has too little space."""
        for k in range(len(self._held), len(self.batches)):
            behind = _behind(self.model, self.task, self.batches[k])
            if k == 0:
                self._prepare(len(self.batches) * sum(tensor.nbytes for tensor in behind.values()))
            self._held.append(behind if self._folder is None else _in_file(behind, self._folder / f"{k}.pt"))

    def behind(self, k: int, branch: Branch) -> Tensor:
        """Return what batch k has behind a branch [B, T, channels], on the CPU where it was in a file."""
        return self._held[k][branch.name]

    def entering(self, k: int, branch: FeedForward) -> Tensor:
        """Return what the in-projections of a branch read of batch k [B, T, channels], on the CPU where it was in a file."""
        return self._held[k][branch.path]

    def _prepare(self, size: int) -> None:
        """Make a folder for states of this many bytes if they are more than memory shall hold."""
        if size > HELD:
            folder = tempfile.gettempdir()
            free = shutil.disk_usage(folder).free
            if size > free:
                raise InputError(
                    f"examples: expected fewer, or more space in {folder} (TMPDIR sets another folder): the dense model's "
                    f"states take about {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
                )
            self._folder = Path(tempfile.mkdtemp(prefix="secateur-"))
            # Windows keeps files that are still mapped.
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)


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
    """Run a whole pass. Returns by branch what `Reached.behind` is, and by path what feed-forwards read."""
    streams, found = Streams(model), dict[str, Tensor]()

    def put(branch: Branch, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if branch.name not in found:
            found[branch.name] = streams.reached(branch, arguments[0], output).behind
            streams.add(branch, output)

    def read(module: nn.Module, arguments: tuple[Any, ...], path: str) -> None:
        found.setdefault(path, arguments[0])

    with ExitStack() as stack, torch.no_grad():
        for ffn in feed_forwards(branches(model).values()):
            handle = model.get_submodule(ffn.path).register_forward_pre_hook(partial(read, path=ffn.path))
            stack.callback(handle.remove)
        for branch in branches(model).values():
            stack.enter_context(streams.reading(branch))
            handle = model.get_submodule(branch.output).register_forward_hook(partial(put, branch), prepend=True)
            stack.callback(handle.remove)
        task.logits(model, batch)
    return found


def _in_file(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Write tensors to a new file. Returns them mapped from it to the CPU's memory, which the system can take back."""
    torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, path)
    mapped: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)
    return mapped
