"""Clock: the wall-clock budget of a healing, which a resumed run continues."""

from __future__ import annotations

import time

import torch.distributed as dist


class Clock:
    """The time that a healing has used, and its limit.

    Args:
        minutes: The limit; None for none.
    """

    def __init__(self, minutes: float | None) -> None:
        self._limit = None if minutes is None else 60.0 * minutes
        self._began, self._before = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """The seconds that are used, those of the killed run that this one continues included."""
        return self._before + time.monotonic() - self._began

    @property
    def left(self) -> float | None:
        """The seconds that are left; None without a limit."""
        return None if self._limit is None else self._limit - self.seconds

    def continue_from(self, seconds: float) -> None:
        """Count the seconds that a killed run had used at its last checkpoint."""
        self._before = seconds

    def over(self, needed: float = 0.0) -> bool:
        """Return whether less time is left than something needs (seconds). All processes get the answer of the first one."""
        if self._limit is None:
            return False
        answer = [self._limit - self.seconds <= needed]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(answer)
        return answer[0]
