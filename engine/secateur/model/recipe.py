"""A recipe for a smaller model in the making, and how the tensors of its rebuilt modules come out of the dense ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.linear_layers import is_transposed


@dataclass(frozen=True)
class Cut:
    """A tensor of a rebuilt module, cut out of the dense model's parameter `source`: along `dim` its blocks of `width` with the
    numbers `blocks` (int64) stay; all of it where `blocks` is None. turned: what stays is transposed."""

    source: str
    dim: int = 0
    width: int = 1
    blocks: Tensor | None = None
    turned: bool = False

    @classmethod
    def along(cls, dim: int, index: Tensor | None, source: str, dense: Tensor, turned: bool = False) -> Cut:
        """What the sorted positions `index` (None for all) leave of a parameter. Whole heads are copied as blocks, not number
        by number."""
        size = dense.shape[dim]
        if index is None or len(index) == size:
            return cls(source, turned=turned)
        gaps = (index.diff() != 1).nonzero().flatten()
        ends = torch.cat([index[:1], index[gaps] + 1, index[gaps + 1], index[-1:] + 1])
        width = math.gcd(size, *ends.tolist())
        return cls(source, dim, width, (index[::width] // width).to(dense.device), turned)

    def shape(self, dense: Tensor) -> list[int]:
        """The shape of what stays."""
        shape = list(dense.shape)
        if self.blocks is not None:
            shape[self.dim] = self.width * len(self.blocks)
        return shape[::-1] if self.turned else shape

    def of(self, dense: Tensor) -> Tensor:
        """What stays, copied, contiguous."""
        if self.turned:
            return replace(self, turned=False).of(dense).T.contiguous()
        if self.blocks is None:
            return dense.clone(memory_format=torch.contiguous_format)
        if self.width > 1:
            blocked = dense.reshape(*dense.shape[: self.dim], -1, self.width, *dense.shape[self.dim + 1 :])
            return blocked.index_select(self.dim, self.blocks).reshape(self.shape(dense))
        if self.dim == 1 and dense.device.type == "cpu" and dense.dtype != torch.float32:
            # index_select picks single columns fast for float32 alone: 4 times slower than this for bfloat16 and float64.
            return dense.gather(1, self.blocks.expand(len(dense), -1))
        return dense.index_select(self.dim, self.blocks)


@dataclass
class Rebuild:
    """A recipe for `modeling.rebuild_`, and by name the tensors that the rebuilt modules then hold: cuts, and what is made
    instead, such as `slots` and factors."""

    recipe: dict[str, Any] = field(
        default_factory=lambda: {"modules": {}, "attributes": {}, "own_position_bias": [], "no_attention": {}}
    )
    cuts: dict[str, Cut] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)

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
        has_bias, transposed = getattr(module, "bias", None) is not None, is_transposed(module)
        along, index = (0, rows) if rows is not None else (1, columns)
        # A Conv1D stays one where it can: it neither scatters nor gathers, nor takes inputs without channels.
        emptied = columns is not None and not len(columns)
        turned = transposed and (scatter is not None or gather is not None or emptied)
        shape = self._cut(model, f"{path}.weight", 1 - along if transposed else along, index, turned=turned)
        inputs, outputs = shape if transposed and not turned else shape[::-1]
        if has_bias:
            self._cut(model, f"{path}.bias", 0, rows)
        spec: dict[str, Any] = {"linear": [inputs, outputs], "bias": has_bias}
        if transposed and not turned:
            spec["transposed"] = True
        if scatter is not None:
            spec["scatter"] = len(scatter)
        if gather is not None:
            spec["gather"] = True
        slots = scatter if scatter is not None else gather
        if slots is not None:
            self.made[f"{path}.slots"] = slots.to(model.get_parameter(f"{path}.weight").device)
        self.recipe["modules"][path] = spec

    def low_rank(self, model: nn.Module, path: str, left: Tensor, basis: Tensor) -> None:
        """Two smaller layers instead of a linear one [d, k], whose bias stays: left [d, rank] and basis [rank, k]."""
        has_bias = getattr(model.get_submodule(path), "bias", None) is not None
        self.made |= {f"{path}.weight": left, f"{path}.basis": basis}
        if has_bias:
            self.cuts[f"{path}.bias"] = Cut(f"{path}.bias")
        self.recipe["modules"][path] = {"linear": [basis.shape[1], left.shape[0]], "bias": has_bias, "rank": len(basis)}

    def embedding(self, model: nn.Module, path: str, source: str, columns: Tensor) -> None:
        """An embedding table that holds some columns of the one at `source`."""
        self.recipe["modules"][path] = {"embedding": self._cut(model, f"{path}.weight", 1, columns, source=f"{source}.weight")}

    def attributes(self, path: str, values: dict[str, Any]) -> None:
        """Attributes to set on a module."""
        self.recipe["attributes"].setdefault(path, {}).update(values)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What the rebuilt modules hold, its cuts taken from the model."""
        return {name: cut.of(model.get_parameter(cut.source).detach()) for name, cut in self.cuts.items()} | self.made

    def _cut(
        self, model: nn.Module, name: str, dim: int, index: Tensor | None, *, source: str | None = None, turned: bool = False
    ) -> list[int]:
        """Notes the cut and returns its shape."""
        source = source or name
        dense = model.get_parameter(source)
        cut = self.cuts[name] = Cut.along(dim, index, source, dense, turned)
        return cut.shape(dense)
