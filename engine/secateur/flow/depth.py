"""Depth: the order in which a model's blocks can be removed as wholes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.data.examples import Examples
from secateur.flow.choose import divergence_of, target_logits
from secateur.model.blocks import Block, blocks, contributes, gated
from secateur.model.families import family_of
from secateur.model.undisturbed import undisturbed
from secateur.support.progress import Progress, counted
from secateur.tasks import Batch, Task
from secateur.tasks.base import require_fit
from secateur.tasks.batches import model_device

# Examples that tell blocks apart, and the share of all blocks that may go.
EXAMPLES, DEEPEST = 60, 0.5


def removable_blocks(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
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
        unlabeled: Whether examples are inputs alone, as in `recover_`.
        max_tokens: Padded input tokens in a batch.
        progress: True for a progress bar, or a function of (blocks removed, blocks that may go).

    Returns:
        The names of the blocks, such as "encoder.3"; none where a block without its branches still does something (post-norm
            blocks, and layers with biases).

    Raises:
        InputError: The examples are unusable, or the model does not fit the task.

    Example:
        >>> removable = secateur.removable_blocks(model, task, examples)
        >>> plans = secateur.alternatives(scores, flops=0.5, shape="stock", removable=removable)

    Reference:
        Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set functions", for the order of the computations.
    """
    require_fit(task, model)
    rows = task.read(examples, all_labels=unlabeled)
    present = blocks(model)
    if not all(_vanishes(model, block) for block in present.values()):
        return []
    items = task.items(model, rows[:EXAMPLES], all_labels=unlabeled)
    batches = list(task.batches(items, model_device(model), max_tokens))
    gone: list[Block] = []
    with undisturbed(model), torch.inference_mode():
        dense = [target_logits(model, task, batch) for batch in batches]
        known = dict.fromkeys(present.values(), 0.0)  # Each block's change when it was last computed.
        most = int(len(present) * DEEPEST)
        for _ in counted(progress, "removing blocks", range(most), most):
            allowed = [block for block in known if _may_go(model, present, [*gone, block])]
            if not allowed:
                break
            fresh: set[Block] = set()
            while (best := min(allowed, key=known.__getitem__)) not in fresh:
                known[best] = _change(model, task, batches, dense, [*gone, best])
                fresh.add(best)
            gone.append(best)
            del known[best]
    return [block.name for block in gone]


def _vanishes(model: nn.Module, block: Block) -> bool:
    """Whether a block whose units are all removed does nothing: it has no bias left, and no norm on the residual stream."""
    has_bias = any(getattr(model.get_submodule(branch.output), "bias", None) is not None for branch in block.branches)
    return family_of(model).keep_blocks is not None and not has_bias


def _may_go(model: nn.Module, present: dict[str, Block], gone: Sequence[Block]) -> bool:
    """Whether a config describes the model without these blocks: each stack has one, and the encoder as many as the decoder."""
    kept = {
        stack: [block.layer for block in present.values() if block.stack == stack and block not in gone]
        for stack in {block.stack for block in present.values()}
    }
    keep_blocks = family_of(model).keep_blocks
    if not all(kept.values()) or len(kept.get("encoder", kept.get("decoder", []))) < len(kept.get("decoder", [])):
        return False
    return keep_blocks is not None and keep_blocks(copy.deepcopy(model.config), kept)


def _change(model: nn.Module, task: Task, batches: Sequence[Batch], dense: Sequence[Tensor], gone: Sequence[Block]) -> float:
    """The divergence of the predictions without some blocks from the dense ones, summed over the batches."""
    like = next(model.parameters())
    gates = {
        branch: torch.zeros(1, dtype=torch.float32, device=like.device)
        for block in gone
        for branch in block.branches
        if contributes(model, branch)
    }
    with gated(model, gates):
        return sum(
            float(divergence_of(before, target_logits(model, task, batch)).sum())
            for before, batch in zip(dense, batches, strict=True)
        )
