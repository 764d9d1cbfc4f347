"""Batches of items of similar length in random order, the same in every iteration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 8  # Batches whose items are sorted by length together.


class LengthBatches(Sampler[list[int]]):
    """A batch sampler: items come in a random order, and a new order is drawn when they run out.

    The items of eight batches are sorted by length together, so that batches have little padding. Batch k is the same in every
    iteration, so a resumed run sees the same batches as an uninterrupted one.

    Args:
        lengths: The length of each item.
        batch_size: The number of items in a batch; all items where there are fewer.
        batches: The number of batches.
        seed: The seed of the draws.
    """

    drop_last = True  # Accelerate reads this attribute: there is no last, smaller batch.

    def __init__(self, lengths: Sequence[int], batch_size: int, batches: int, seed: int) -> None:
        self.lengths, self.batches, self.seed = list(lengths), batches, seed
        self.batch_size = min(batch_size, len(self.lengths))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        queue: list[int] = []
        for first in range(0, self.batches, _POOL):
            count = min(_POOL, self.batches - first)
            while len(queue) < count * self.batch_size:
                queue += torch.randperm(len(self.lengths), generator=generator).tolist()
            pool, queue = queue[: count * self.batch_size], queue[count * self.batch_size :]
            pool.sort(key=lambda number: -self.lengths[number])
            for place in torch.randperm(count, generator=generator).tolist():
                yield pool[place * self.batch_size : (place + 1) * self.batch_size]
