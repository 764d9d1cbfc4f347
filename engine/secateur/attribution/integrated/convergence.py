"""How exact integrated gradients are: completeness for each example, and a doubled rule on a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

JOINT = "joint"


@dataclass(frozen=True)
class Convergence:
    """By path: a site's name, or "joint" for all sites at once.

    residuals: |sum_i IG_i - (F(1) - F(0))| / sum_i |IG_i| of each example, float32 [examples], where the first sum is the
    quadrature rule's before completeness corrects it (`adaptive.corrected`); that of the scores themselves is no larger.
    errors: estimates of the relative errors sum_i |IG_i - exact_i| / sum_i |IG_i|, float32 [examples]: the residual, in which
    errors of units cancel, or the difference to a coarser rule on the same nodes, each times its ratio to the error in a pilot
    sample, the larger; relative to the pilot's mean of sum_i |IG_i| where the example's own is smaller, since it then adds as
    little to the scores. Where the number of nodes was given there is no pilot, and this is the residual.
    nodes: gradient passes that were run, rules that were tried and given up included, int64 [examples].
    Where an example is scored for several labels, all three are the largest among them.
    doubled: the relative error summed over a second sample, against rules of twice as many nodes.
    tolerance: what the errors should stay below; None where the number of nodes was given.
    """

    residuals: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    nodes: Mapping[str, Tensor]
    doubled: Mapping[str, float]
    tolerance: float | None

    def missed(self) -> dict[str, list[int]]:
        """By path, the examples whose estimated error exceeds the tolerance although the most nodes were taken."""
        if self.tolerance is None:
            return {path: [] for path in self.errors}
        return {path: (errors > self.tolerance).nonzero().flatten().tolist() for path, errors in self.errors.items()}

    def summary(self) -> dict[str, dict[str, float]]:
        """By path: mean nodes, mean residual, mean estimated error, examples that missed the tolerance, error on the sample."""
        missed = self.missed()
        return {
            path: {
                "nodes": float(self.nodes[path].double().mean()),
                "residual": float(self.residuals[path].double().mean()),
                "error": float(self.errors[path].double().mean()),
                "missed": len(missed[path]),
                "doubled": self.doubled[path],
            }
            for path in self.residuals
        }

    def tensors(self) -> dict[str, Tensor]:
        """What is saved as tensors."""
        kinds = {"residuals": self.residuals, "errors": self.errors, "nodes": self.nodes}
        return {f"{kind}/{path}": value for kind, of in kinds.items() for path, value in of.items()}

    def to_json(self) -> dict[str, Any]:
        """The rest."""
        return {"doubled": dict(self.doubled), "tolerance": self.tolerance}

    @classmethod
    def read(cls, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Convergence:
        """From what `tensors` and `to_json` gave."""

        def part(kind: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{kind}/"): value for key, value in tensors.items() if key.startswith(f"{kind}/")}

        return cls(part("residuals"), part("errors"), part("nodes"), about["doubled"], about["tolerance"])


def raise_(largest: Tensor, rows: Tensor, values: Tensor) -> None:
    """Raises the tensor [examples] to a batch's values [B] at its rows; the largest counts where a row has several."""
    largest.scatter_reduce_(0, rows, values.to(largest.dtype), "amax")
