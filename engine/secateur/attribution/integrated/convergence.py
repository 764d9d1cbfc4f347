"""How exact integrated gradients are: completeness for each example, and a rule of twice the nodes for a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.support.errors import FieldError
from secateur.support.fields import require_type
from secateur.support.html import html_table
from secateur.support.tensors import same_tensors

JOINT = "joint"


@dataclass(frozen=True, eq=False, repr=False)
class Convergence:
    """How exact integrated gradients are, by path. A path is a site's name, or "joint" for all sites at once.

    If an example is scored for several labels, its residual, error and nodes are the largest among the labels.

    Attributes:
        residuals: The completeness residual of each example, float32 [examples]:
            |sum_i IG_i - (F(1) - F(0))| / sum_i |IG_i|. Here the first sum is the quadrature rule's, before completeness
            corrects it (`adaptive.corrected`). The residual of the scores themselves is no larger.
        errors: The estimated relative error of each example, float32 [examples]: sum_i |IG_i - exact_i| / sum_i |IG_i|. There
            are two measures of it: the residual, in which errors of units cancel, and the difference to a coarser rule on the
            same nodes. Both are multiplied by their ratio to the error in a pilot sample, and the larger product counts. It is
            relative to the pilot's mean of sum_i |IG_i| if the example's own sum is smaller, because then the example adds
            little to the scores. With a given number of nodes there is no pilot, and the error is the residual.
        nodes: The number of gradient passes of each example, int64 [examples]. Rules that were tried and given up count too.
        doubled: The relative error summed over a second sample of examples, against rules of twice as many nodes.
        tolerance: The largest estimated error that was asked for; None if the number of nodes was given.

    Example:
        >>> scores = secateur.attribute(model, task, examples, criterion="ig")
        >>> scores.convergence.missed()  # {"encoder.0.ffn": [], ...}: all examples are within the tolerance.
    """

    residuals: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    nodes: Mapping[str, Tensor]
    doubled: Mapping[str, float]
    tolerance: float | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Convergence):
            return NotImplemented
        return self.to_json() == other.to_json() and same_tensors(self.tensors(), other.tensors())

    def __hash__(self) -> int:
        return hash((self.tolerance, tuple(self.doubled)))

    def __repr__(self) -> str:
        errors = [of_path["error"] for of_path in self.summary().values()]
        return f"Convergence({len(errors)} paths, largest mean error {max(errors, default=0.0):.2%})"

    def _repr_html_(self) -> str:
        rows = [
            (path, f"{of_path['nodes']:.1f}", f"{of_path['residual']:.2%}", f"{of_path['error']:.2%}", int(of_path["missed"]))
            for path, of_path in self.summary().items()
        ]
        return html_table("convergence, means over the examples", ("path", "nodes", "residual", "error", "missed"), rows)

    def missed(self) -> dict[str, list[int]]:
        """List the examples whose estimated error exceeds the tolerance although the most nodes were used.

        Returns:
            The indices of these examples by path. The lists are empty if there is no tolerance.
        """
        if self.tolerance is None:
            return {path: [] for path in self.errors}
        return {path: (errors > self.tolerance).nonzero().flatten().tolist() for path, errors in self.errors.items()}

    def summary(self) -> dict[str, dict[str, float]]:
        """Summarise the convergence of each path.

        Returns:
            By path: the means over the examples of "nodes", "residual" and (estimated) "error", the number of examples that
            "missed" the tolerance, and the error against "doubled" rules on the sample.
        """
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
        """Return the attributes that are saved as tensors, by "attribute/path"."""
        kinds = {"residuals": self.residuals, "errors": self.errors, "nodes": self.nodes}
        return {f"{kind}/{path}": value for kind, by_path in kinds.items() for path, value in by_path.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the attributes that are not in `tensors`, as JSON values."""
        return {"doubled": dict(self.doubled), "tolerance": self.tolerance}

    @classmethod
    def read(cls, about: Any, tensors: Mapping[str, Tensor]) -> Convergence:
        """Read what `to_json` and `tensors` returned.

        Args:
            about: The JSON values.
            tensors: The tensors. Others among them are ignored.

        Returns:
            The convergence.

        Raises:
            FieldError: A value is missing or has another type.
        """
        require_type("convergence", dict[str, Any], about)
        require_type("convergence.doubled", dict[str, float], about.get("doubled"))
        require_type("convergence.tolerance", float | None, about.get("tolerance"))

        def part(kind: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{kind}/"): value for key, value in tensors.items() if key.startswith(f"{kind}/")}

        residuals, errors, nodes = part("residuals"), part("errors"), part("nodes")
        doubled = about["doubled"]
        if any(values.keys() != doubled.keys() for values in (residuals, errors, nodes)):
            raise FieldError(f"convergence: expected tensors of the paths {', '.join(doubled)}, got those of others")
        return cls(residuals, errors, nodes, doubled, about.get("tolerance"))


def raise_(largest: Tensor, rows: Tensor, values: Tensor) -> None:
    """Raise a tensor to a batch's values at the batch's rows, in place. If a row has several values, the largest counts.

    Args:
        largest: The largest values so far [examples].
        rows: The rows of the batch, int64 [B].
        values: The batch's values [B].
    """
    largest.scatter_reduce_(0, rows, values.to(largest.dtype), "amax")
