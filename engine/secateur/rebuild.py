"""A recipe for a smaller model in the making, and the tensors of its rebuilt modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Rebuild:
    """A recipe for `modeling.rebuild_` and the tensors that the rebuilt modules then hold."""

    recipe: dict[str, Any] = field(default_factory=lambda: {"modules": {}, "attributes": {}, "own_position_bias": []})
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def linear(
        self,
        model: nn.Module,
        path: str,
        *,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        scatter: Tensor | None = None,
        gather: Tensor | None = None,
    ) -> None:
        """A linear layer that keeps some rows (outputs) or columns (inputs), scattered or gathered if slots are given."""
        module = model.get_submodule(path)
        weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
        if rows is not None:
            rows = rows.to(weight.device)
            weight, bias = weight[rows], None if bias is None else bias[rows]
        if columns is not None:
            weight = weight[:, columns.to(weight.device)]
        spec: dict[str, Any] = {"linear": [weight.shape[1], weight.shape[0]], "bias": bias is not None}
        self.tensors[f"{path}.weight"] = weight.contiguous()
        if bias is not None:
            self.tensors[f"{path}.bias"] = bias.detach().clone()
        if scatter is not None:
            spec["scatter"] = len(scatter)
        if gather is not None:
            spec["gather"] = True
        slots = scatter if scatter is not None else gather
        if slots is not None:
            self.tensors[f"{path}.slots"] = slots.to(weight.device)
        self.recipe["modules"][path] = spec

    def embedding(self, path: str, table: Tensor) -> None:
        """An embedding table with these values."""
        self.recipe["modules"][path] = {"embedding": list(table.shape)}
        self.tensors[f"{path}.weight"] = table.detach()

    def attributes(self, path: str, values: dict[str, Any]) -> None:
        """Attributes to set on a module."""
        self.recipe["attributes"].setdefault(path, {}).update(values)
