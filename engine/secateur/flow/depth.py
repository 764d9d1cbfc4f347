"""Depth: the order in which a model's blocks can be removed as wholes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.examples import Examples
from secateur.measuring.divergence import divergence_of, target_logits
from secateur.model.blocks import blocks
from secateur.model.hooks import replaced, returning
from secateur.model.removed_blocks import DEEPEST, may_go, skipped
from secateur.model.undisturbed import undisturbed
from secateur.recovery.targets import HELD
from secateur.support.compat import tree_leaves
from secateur.support.errors import InputError
from secateur.support.progress import Progress, counted
from secateur.tasks import Batch, Task
from secateur.tasks.base import require_fit
from secateur.tasks.batches import model_device

EXAMPLES = 60  # Examples that tell blocks apart.


def removable_blocks(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    among: Collection[str] | None = None,
    unlabeled: bool = False,
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[str]:
    """Return the names of blocks in the order in which they can be removed, up to half of them.

    Each step removes the block whose absence changes the model's predictions least, with the blocks before it gone already. A
    block's change is computed again only once it is the least one known: the fewer blocks there are, the more each is missed.

    Args:
        model: The model. Afterwards it is as it was.
        task: The task.
        examples: The examples, as in `attribute`, of which 60 are used at most.
        among: The names of the blocks that may go, such as `scores.scored_blocks()`. By default all.
        unlabeled: Whether examples are inputs alone, as in `recover_`.
        max_tokens: Padded input tokens in a batch.
        progress: True for a progress bar, or a function of (blocks removed, blocks that may go).

    Returns:
        The names of the blocks, such as "encoder.3"; none where no config describes a model with fewer blocks.

    Raises:
        InputError: The examples are unusable, the model does not fit the task, or it lacks one of the blocks.

    Example:
        >>> removable = secateur.removable_blocks(model, task, examples)
        >>> plans = secateur.alternatives(scores, flops=0.5, shape="stock", removable=removable)

    Reference:
        Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set functions", for the order of the computations.
    """
    require_fit(task, model)
    rows = task.read(examples, all_labels=unlabeled)
    items = task.items(model, rows[:EXAMPLES], all_labels=unlabeled)
    batches = list(task.batches(items, model_device(model), max_tokens))
    present, gone = list(blocks(model)), list[str]()
    if unknown := [name for name in among or () if name not in present]:
        raise InputError(f"among: expected some of {', '.join(present)}, got {unknown[0]!r}")
    with undisturbed(model), torch.inference_mode():
        passes = _Passes(model, task, batches)
        known = dict.fromkeys(present if among is None else among, 0.0)  # Each block's change when it was last computed.
        most = int(len(present) * DEEPEST)
        for _ in counted(progress, "removing blocks", range(most), most):
            allowed = [block for block in known if may_go(model, [*gone, block])]
            if not allowed:
                break
            passes.start(gone)
            fresh: set[str] = set()
            while (best := min(allowed, key=known.__getitem__)) not in fresh:
                known[best] = passes.change(best)
                fresh.add(best)
            gone.append(best)
            del known[best]
    return gone


class _Passes:
    """Passes of some batches without a growing number of blocks. Blocks in front of the next one to go are not run again.

    The model must be `undisturbed`.
    """

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> None:
        self._model, self._task, self._batches = model, task, batches
        self._paths = {name: block.path for name, block in blocks(model).items()}
        self._gone: Sequence[str] = ()
        self._held: list[dict[str, Any]] = [{} for _ in batches]  # By batch and path of a block what it returns.
        self._dense: list[Tensor] = []

    def change(self, block: str) -> float:
        """Return the divergence of the predictions without one more block from the dense ones, summed over the batches."""
        total, names = 0.0, list(self._paths)
        before = [self._paths[name] for name in names[: names.index(block)]]
        with skipped(self._model, [*self._gone, block]), self._task.sharing(self._model):
            for dense, batch, held in zip(self._dense, self._batches, self._held, strict=True):
                with replaced(self._model, {path: returning(held[path]) for path in before if path in held}):
                    total += float(divergence_of(dense, target_logits(self._model, self._task, batch)).sum())
        return total

    def start(self, gone: Sequence[str]) -> None:
        """Run without some blocks, first without none, and hold what the blocks return where there is room for it."""
        self._gone, logits = tuple(gone), []
        with skipped(self._model, self._gone), self._task.sharing(self._model), ExitStack() as stack:
            for path in self._paths.values():
                stack.callback(self._model.get_submodule(path).register_forward_hook(partial(self._store, path)).remove)
            for held, batch in zip(self._held, self._batches, strict=True):
                self._now = held
                logits.append(target_logits(self._model, self._task, batch))
        self._dense = self._dense or logits

    def _store(self, path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        states = sum(part.nbytes for part in tree_leaves(output) if isinstance(part, Tensor))
        if states * len(self._paths) * len(self._batches) <= HELD:
            self._now[path] = output
