"""Healed: the model that a healing gives, with the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.healing.blockwise import BlockFit


@dataclass(frozen=True, repr=False)
class Healed:
    """A healed model.

    Attributes:
        model: The model, with the shapes, the config, the dtypes, the modes and the flags of the pruned one.
        before: The divergence of the pruned model's predictions from the teacher's on the held-out examples, in nats for each
            item, as `choose` measures it.
        after: The same of `model`. It is `before` where no evaluation was better than the start.
        history: The steps and the divergences of all evaluations.
        blocks: The blocks that were trained alone; empty without blockwise training.
        steps: The steps of the end-to-end training.
        seconds: The wall-clock time, evaluations included.
        examples: The numbers of "fitted" and "held_out" examples.
        settings: The settings.
    """

    model: nn.Module
    before: float
    after: float
    history: Sequence[tuple[int, float]]
    blocks: Sequence[BlockFit]
    steps: int
    seconds: float
    examples: Mapping[str, int]
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return all but the model as JSON values."""
        return {
            "divergence": {"before": self.before, "after": self.after},
            "history": [{"step": step, "divergence": divergence} for step, divergence in self.history],
            "blocks": [fit.to_json() for fit in self.blocks],
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "examples": dict(self.examples),
            "settings": dict(self.settings),
        }

    def lines(self) -> list[str]:
        """Return what the healing did, in words."""
        lines = []
        if self.blocks:
            before, after = (sum(getattr(fit, name) for fit in self.blocks) / len(self.blocks) for name in ("before", "after"))
            lines.append(
                f"blocks: the states behind them were {before:.1%} off (squared, mean of {len(self.blocks)}), are {after:.1%} "
                "off"
            )
        kept = "" if self.after < self.before else "; no evaluation was better than the start, which stays"
        return [
            *lines,
            f"healing: {self.before:.4f} nats from the teacher on {self.examples['held_out']} held-out examples before, "
            f"{self.after:.4f} after {self.steps} steps in {self.seconds:.0f} s{kept}",
        ]

    def __repr__(self) -> str:
        return f"Healed({self.before:.4f} -> {self.after:.4f} nats in {self.steps} steps)"

    def __str__(self) -> str:
        return "\n".join(self.lines())
