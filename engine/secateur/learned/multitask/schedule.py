"""The cubic schedule of density, and how much of what is to go is still there at a step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from secateur.support.errors import InputError


@dataclass(frozen=True)
class CubicSchedule:
    """Density over training: v(t) = v_f + (v_i - v_f)(1 - (t - t_i)/(T - t_i - t_f))^3 (Zhu and Gupta 2017, arXiv 1710.01878,
    in the form of Sanh et al. 2020, arXiv 2005.07683).

    warmup, cooldown: the shares t_i/T and t_f/T of the steps during which the density stays at its first and at its last value.
    The defaults are those of Xia and Shin 2021 (arXiv 2112.05705): two epochs of eight each. v_i is 1.
    Raises InputError: shares that are negative or leave nothing between them.
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
        """The share, from 1 down to 0, of what is to be pruned in the end that is there after `step` of `steps` steps."""
        first, last = self.warmup * steps, self.cooldown * steps
        done = (step - first) / (steps - first - last) if steps else 1.0
        return float((1 - min(max(done, 0.0), 1.0)) ** 3)

    def density(self, step: int, steps: int, final: float) -> float:
        """v(step) with v_f = final and v_i = 1."""
        return final + (1 - final) * self.remaining(step, steps)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
