"""The cubic schedule of the density over the training steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from secateur.support.errors import InputError


@dataclass(frozen=True)
class CubicSchedule:
    """The density v(t) at step t of T: v(t) = v_f + (v_i - v_f)(1 - (t - t_i)/(T - t_i - t_f))^3, with v_i = 1.

    The defaults are those of Xia and Shin 2021: two of eight epochs for warm-up, and two for cool-down.

    Args:
        warmup: t_i/T, the share of the steps at the start with density v_i, in [0, 1).
        cooldown: t_f/T, the share of the steps at the end with density v_f, in [0, 1).

    Raises:
        InputError: A share is out of range, or the two leave no steps between them.

    References:
        Zhu and Gupta 2017, arXiv 1710.01878 (the cubic schedule).
        Sanh et al. 2020, arXiv 2005.07683 (this form of it).
        Xia and Shin 2021, arXiv 2112.05705 (the defaults).
    """

    warmup: float = 0.25
    cooldown: float = 0.25

    def __post_init__(self) -> None:
        for name in ("warmup", "cooldown"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: expected a share of the steps in [0, 1), got {getattr(self, name)}")
        if self.warmup + self.cooldown >= 1:
            raise InputError(f"cooldown: expected less than 1 - warmup = {1 - self.warmup:g}, got {self.cooldown}")

    def remaining(self, step: int, steps: int) -> float:
        """Compute the share of the entries to prune that is still there.

        Args:
            step: The number of steps done.
            steps: The total number of steps.

        Returns:
            A share that falls from 1 to 0.
        """
        first, last = self.warmup * steps, self.cooldown * steps
        done = (step - first) / (steps - first - last) if steps else 1.0
        return float((1 - min(max(done, 0.0), 1.0)) ** 3)

    def density(self, step: int, steps: int, final: float) -> float:
        """Compute v(step).

        Args:
            step: The number of steps done.
            steps: The total number of steps.
            final: The final density v_f, in (0, 1].

        Returns:
            The density, in [final, 1].
        """
        return final + (1 - final) * self.remaining(step, steps)

    def to_json(self) -> dict[str, Any]:
        """Return the two shares as JSON values by name."""
        return asdict(self)
