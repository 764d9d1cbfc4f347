"""The tokens of a batch where the caller gives no number: 4,096 on a CPU, and as many as the free memory holds on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from secateur.tasks import Batch, Item, Task
from secateur.tasks.batches import buckets, model_device

logger = logging.getLogger("secateur")

LEAST = 4096
MOST = 65536  # Offsets of the widest known layers, 28,672 channels, still fit into 31 bits.
_SHARE = 0.5  # Of the free memory. Criteria that hold more than one pass, and fragmentation, need the rest.
_BATCHES = 8  # A process gets as many batches at least, so that similar lengths share a batch and processes share the work.


def pass_tokens(
    model: nn.Module,
    task: Task,
    items: Sequence[Item],
    run: Callable[[Batch], object],
    *,
    batch_tokens: Callable[[int], int] = lambda tokens: tokens,
    processes: int = 1,
) -> int:
    """Choose the most padded input tokens of a pass for the model's device.

    On one GPU a batch of the longest examples runs twice. The first run lets libraries allocate what they keep, and the second
    one tells how many bytes a token takes. All other models get `LEAST`.

    Args:
        model: The model.
        task: The task, which makes batches.
        items: The items of all processes.
        run: A pass over a batch, with all the memory that it takes.
        batch_tokens: The tokens of a batch, given those of a pass, as in `Criterion.batch_tokens`.
        processes: The number of processes that share the items.

    Returns:
        A power of two from `LEAST` to `MOST`.
    """
    device = model_device(model)
    enough = LEAST
    while enough < MOST and batch_tokens(2 * enough) * _BATCHES * processes <= sum(item.length for item in items):
        enough *= 2
    if device.type != "cuda" or enough == LEAST or any(parameter.device != device for parameter in model.parameters()):
        return LEAST
    batch = task.collate(buckets(items, LEAST)[0], device)
    run(batch)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, before = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_allocated(device)
    run(batch)
    used = torch.cuda.max_memory_allocated(device) - before
    tokens = min(enough, fitting(used, len(batch.rows) * batch.length, free))
    logger.info("passes of %d tokens: %d bytes a token, %d bytes free", tokens, used // (len(batch.rows) * batch.length), free)
    return tokens


def fitting(used: int, tokens: int, free: int) -> int:
    """Compute how many tokens fit into half of the free memory.

    Args:
        used: The peak memory of a pass, in bytes, without what was allocated before it.
        tokens: The padded tokens of that pass.
        free: The free memory in bytes.

    Returns:
        The largest power of two that fits, but `LEAST` at least and `MOST` at most.
    """
    most = int(_SHARE * free * tokens) // max(used, 1)
    return min(MOST, max(LEAST, 1 << max(most.bit_length() - 1, 0)))
