"""Processes of torch.distributed that share one attribution: they share the batches, the sums and the errors."""

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
_STEPS = 8  # Batches between two meetings. A process learns of an error in another one at the next meeting.


class SharedError(InputError):
    """An InputError of one process, which all processes of the group raise."""


class Ranks:
    """The processes of a group. All of them must call each method together.

    Attributes:
        group: The group, or None for this process alone.
        rank: The number of this process in the group.
        size: The number of processes.

    Args:
        group: The processes. None means that this process works alone.

    Raises:
        InputError: This process does not belong to the group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.rank < 0:
            raise InputError("group: expected a group that this process belongs to, got another")

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Make an InputError of one process a SharedError of all processes, at their next meeting or at the end of the context.

        Raises:
            SharedError: A process has raised an InputError. A process that works alone raises its own InputError.
        """
        message = None
        try:
            yield
        except SharedError:
            raise
        except InputError as error:
            if self.size == 1:
                raise
            message = str(error)
        self.meet(error=message)

    def meet(self, value: Any = None, error: str | None = None) -> list[Any]:
        """Exchange a value between all processes.

        Args:
            value: The value of this process, which must be picklable.
            error: The error message of this process, if it has one.

        Returns:
            The values of all processes, in the order of the ranks.

        Raises:
            SharedError: A process has an error message.
        """
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, (value, error), self.group)
        for _, message in gathered:
            if message is not None:
                raise SharedError(message)
        return [of_rank for of_rank, _ in gathered]

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Check that all processes have the same settings.

        Args:
            settings: The settings of this process by name.

        Raises:
            SharedError: A process has other settings than the first process.
        """
        settings_of = self.meet(settings)
        for rank, settings_there in enumerate(settings_of):
            for name in settings:
                if settings_there[name] != settings_of[0][name]:
                    raise SharedError(f"group: expected the same {name} in all processes, got another in process {rank}")

    def deal(self, costs: Sequence[int]) -> list[int]:
        """Share out the batches. Each batch goes to the process with the smallest load so far.

        Args:
            costs: The cost of each batch.

        Returns:
            The indices of this process's batches.
        """
        loads, own_batches = [0] * self.size, []
        for number, cost in enumerate(costs):
            rank = loads.index(min(loads))
            loads[rank] += cost
            if rank == self.rank:
                own_batches.append(number)
        return own_batches

    def in_step(self, steps: Sequence[T]) -> Iterator[T]:
        """Iterate over this process's steps, with meetings in between.

        All processes take part in the same number of meetings, also those that have fewer steps.

        Args:
            steps: The steps of this process.

        Yields:
            Each step.

        Raises:
            SharedError: Another process has an error.
        """
        for number in range(max(self.meet(len(steps)))):
            if number and number % _STEPS == 0:
                self.meet()
            if number < len(steps):
                yield steps[number]
        self.meet()

    def merge_(self, partial: PartialSums) -> None:
        """Combine the partial sums of all processes, in place: add the sums, and take the largest values.

        Args:
            partial: This process's partial sums. Afterwards all processes have the same.
        """
        if self.size == 1:
            return
        for tensors, operation in ((partial.sums, dist.ReduceOp.SUM), (partial.largest, dist.ReduceOp.MAX)):
            for tensor in tensors.values():
                self._all_reduce_(tensor, operation)

    def _all_reduce_(self, tensor: Tensor, operation: Any) -> None:
        """Combine one CPU tensor of all processes, in place."""
        on_cpu = "cpu:" in dist.get_backend_config(self.group)
        # A group that runs NCCL alone cannot reduce tensors on the CPU.
        reduced = tensor if on_cpu else tensor.to(torch.device("cuda", torch.cuda.current_device()))
        dist.all_reduce(reduced, operation, self.group)
        tensor.copy_(reduced)
