"""Processes of torch.distributed that share one attribution: who takes which batch, one sum, and an error that ends all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.attribution.checkpoint import PartialSums
from secateur.support.errors import InputError

T = TypeVar("T")
_STEPS = 8  # Batches between two meetings: an error elsewhere is known after that many.


class SharedError(InputError):
    """What one process found wrong, raised by all of them."""


class Ranks:
    """The processes of a group, which call each method together; or this process alone, where the group is None.

    Raises InputError: a group that this process is not in.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.rank < 0:
            raise InputError("group: expected one that this process belongs to, got another")

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Inside, an InputError of one process becomes a SharedError of all, at their next meeting or at the end."""
        error = None
        try:
            yield
        except SharedError:
            raise
        except InputError as found:
            if self.size == 1:
                raise
            error = str(found)
        self.meet(error=error)

    def meet(self, value: Any = None, error: str | None = None) -> list[Any]:
        """Each process's value, in the order of the ranks. Raises SharedError if any has an error."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (value, error), self.group)
        for _, message in found:
            if message is not None:
                raise SharedError(message)
        return [each for each, _ in found]

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Raises SharedError where another process has other settings than the first."""
        every = self.meet(settings)
        for rank, found in enumerate(every):
            for name in settings:
                if found[name] != every[0][name]:
                    raise SharedError(f"group: expected the same {name} in all processes, got another in process {rank}")

    def deal(self, costs: Sequence[int]) -> list[int]:
        """Which of the batches are this process's: each goes to the one with the least to do so far."""
        load, own = [0] * self.size, []
        for number, cost in enumerate(costs):
            taker = load.index(min(load))
            load[taker] += cost
            if taker == self.rank:
                own.append(number)
        return own

    def in_step(self, steps: Sequence[T]) -> Iterator[T]:
        """This process's steps, with meetings in between: as many for those that have fewer steps."""
        for number in range(max(self.meet(len(steps)))):
            if number and number % _STEPS == 0:
                self.meet()
            if number < len(steps):
                yield steps[number]
        self.meet()

    def merge_(self, partial: PartialSums) -> None:
        """Gives each process the sums and the largest values of all."""
        if self.size == 1:
            return
        for tensors, operation in ((partial.sums, dist.ReduceOp.SUM), (partial.largest, dist.ReduceOp.MAX)):
            for tensor in tensors.values():
                self._all_reduce_(tensor, operation)

    def _all_reduce_(self, tensor: Tensor, operation: Any) -> None:
        on_cpu = "cpu:" in dist.get_backend_config(self.group)
        moved = tensor if on_cpu else tensor.to(torch.device("cuda", torch.cuda.current_device()))  # NCCL alone.
        dist.all_reduce(moved, operation, self.group)
        tensor.copy_(moved)
