"""Rebuild: the recipe of a smaller model, and the slices of the dense model's parameters that its tensors are made from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.model.linear_layers import FLAT, is_transposed
from secateur.support.errors import FieldError
from secateur.support.fields import require_type, shown


@dataclass(frozen=True)
class Cut:
    """A tensor of a rebuilt module as a slice of a parameter of the dense model.

    Whole heads are copied as blocks, not position by position.

    Attributes:
        source: The name of the parameter.
        dim: The dimension that is cut.
        width: The number of neighbouring positions along `dim` that make one block.
        blocks: The numbers of the blocks that stay (int64), or None where all stay.
        turned: Whether the slice is transposed.
    """

    source: str
    dim: int = 0
    width: int = 1
    blocks: Tensor | None = None
    turned: bool = False

    @classmethod
    def along(cls, dim: int, index: Tensor | None, source: str, dense: Tensor, turned: bool = False) -> Cut:
        """Return the cut that keeps some positions of a parameter, in the widest blocks that they consist of.

        Args:
            dim: The dimension that is cut.
            index: The sorted positions that stay (int64 [kept]), or None for all.
            source: The name of the parameter.
            dense: The parameter.
            turned: Whether the slice is transposed.
        """
        size = dense.shape[dim]
        if index is None or len(index) == size:
            return cls(source, turned=turned)
        gaps = (index.diff() != 1).nonzero().flatten()  # [gaps], where a run of neighbouring positions ends.
        # The begins and ends of all runs [2 * (gaps + 1)]. Blocks of a width that divides all of them tile the runs.
        ends = torch.cat([index[:1], index[gaps] + 1, index[gaps + 1], index[-1:] + 1])
        width = math.gcd(size, *ends.tolist())
        # Every width-th kept position begins a block: [kept] to [kept / width].
        return cls(source, dim, width, (index[::width] // width).to(dense.device), turned)

    def shape(self, dense: Tensor) -> list[int]:
        """Return the shape of the slice."""
        shape = list(dense.shape)
        if self.blocks is not None:
            shape[self.dim] = self.width * len(self.blocks)
        return shape[::-1] if self.turned else shape

    def of(self, dense: Tensor) -> Tensor:
        """Return the slice, copied and contiguous."""
        if self.turned:
            return replace(self, turned=False).of(dense).T.contiguous()
        if self.blocks is None:
            return dense.clone(memory_format=torch.contiguous_format)
        if self.width > 1:
            # [..., blocks, width, ...]: the cut dimension becomes two.
            blocked = dense.reshape(*dense.shape[: self.dim], -1, self.width, *dense.shape[self.dim + 1 :])
            return blocked.index_select(self.dim, self.blocks).reshape(self.shape(dense))
        if self.dim == 1 and dense.device.type == "cpu" and dense.dtype != torch.float32:
            # index_select picks single columns fast only in float32; gather is 4 times faster in bfloat16 and float64.
            return dense.gather(1, self.blocks.expand(len(dense), -1))
        return dense.index_select(self.dim, self.blocks)


@dataclass
class Rebuild:
    """A recipe for `modeling.rebuild_`, with the tensors that the rebuilt modules then hold.

    Attributes:
        recipe: The recipe.
        cuts: The tensors, by name, that are slices of the dense model's parameters.
        new: The tensors, by name, that are no slices, such as `slots` and factors.
    """

    recipe: dict[str, Any] = field(
        default_factory=lambda: {"modules": {}, "attributes": {}, "own_position_bias": [], "no_attention": {}}
    )
    cuts: dict[str, Cut] = field(default_factory=dict)
    new: dict[str, Tensor] = field(default_factory=dict)

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
        """Note that a linear layer keeps some rows (outputs) or columns (inputs).

        Args:
            model: The dense model.
            path: The path of the layer.
            rows: The sorted outputs that stay (int64 [kept]).
            columns: The sorted inputs that stay (int64 [kept]).
            scatter: The slots (int64 [outputs]) that the kept outputs are scattered to, if they are.
            gather: The inputs (int64 [kept]) that the layer gathers, if it does.
        """
        module = model.get_submodule(path)
        has_bias, transposed = getattr(module, "bias", None) is not None, is_transposed(module)
        along, index = (0, rows) if rows is not None else (1, columns)
        # A Conv1D stays a Conv1D unless it would scatter, gather or read no channel, which it cannot.
        emptied = columns is not None and not len(columns)
        turned = transposed and (scatter is not None or gather is not None or emptied)
        slots = scatter if scatter is not None else gather
        inner = path if slots is None else f"{path}.linear"
        dim = 1 - along if transposed else along
        shape = self._cut(model, f"{inner}.weight", dim, index, source=f"{path}.weight", turned=turned)
        inputs, outputs = shape if transposed and not turned else shape[::-1]
        if has_bias:
            self._cut(model, f"{inner}.bias", 0, rows, source=f"{path}.bias")
        spec: dict[str, Any] = {"linear": [inputs, outputs], "bias": has_bias}
        if transposed and not turned:
            spec["transposed"] = True
        if scatter is not None:
            spec["scatter"] = len(scatter)
        if gather is not None:
            spec["gather"] = True
        if slots is not None:
            self.new[f"{path}.slots"] = slots.to(model.get_parameter(f"{path}.weight").device)
        self.recipe["modules"][path] = spec

    def low_rank(self, model: nn.Module, path: str, left: Tensor, basis: Tensor) -> None:
        """Note that two layers, left [d, rank] and basis [rank, k], replace a linear layer [d, k], whose bias stays."""
        has_bias = getattr(model.get_submodule(path), "bias", None) is not None
        self.new |= {f"{path}.linear.weight": left, f"{path}.basis.weight": basis}
        if has_bias:
            self.cuts[f"{path}.linear.bias"] = Cut(f"{path}.bias")
        self.recipe["modules"][path] = {"linear": [basis.shape[1], left.shape[0]], "bias": has_bias, "rank": len(basis)}

    def embedding(self, model: nn.Module, path: str, source: str, columns: Tensor) -> None:
        """Note that an embedding table holds some columns (int64) of the table at `source`."""
        self.recipe["modules"][path] = {"embedding": self._cut(model, f"{path}.weight", 1, columns, source=f"{source}.weight")}

    def attributes(self, path: str, values: dict[str, Any]) -> None:
        """Note attributes to set on a module."""
        self.recipe["attributes"].setdefault(path, {}).update(values)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of the rebuilt modules by name, the cuts taken from the dense model."""
        return {name: cut.of(model.get_parameter(cut.source).detach()) for name, cut in self.cuts.items()} | self.new

    def _cut(
        self, model: nn.Module, name: str, dim: int, index: Tensor | None, *, source: str, turned: bool = False
    ) -> list[int]:
        """Note the cut and return its shape."""
        dense = model.get_parameter(source)
        cut = self.cuts[name] = Cut.along(dim, index, source, dense, turned)
        return cut.shape(dense)


def has_around(spec: Mapping[str, Any]) -> bool:
    """Return whether a recipe's module is an `AroundLinear`, which no stock model has."""
    return bool(spec.keys() & {"scatter", "gather", "rank"})


def renamed(recipe: Mapping[str, Any], names: Iterable[str], prefix: str = "") -> dict[str, str]:
    """Return those names of tensors that a recipe's modules no longer have, with the new ones.

    Args:
        recipe: The recipe.
        names: Names as the dense model has them, or a folder from before `AroundLinear`.
        prefix: The base model's prefix, which the recipe's paths may have where the names have none.
    """
    around = {path for path, spec in recipe["modules"].items() if has_around(spec)}
    around |= {path.removeprefix(prefix) for path in around}
    split = {name: name.rpartition(".") for name in names}
    return {name: f"{path}.{FLAT[last]}" for name, (path, _, last) in split.items() if path in around and last in FLAT}


def require_recipe(recipe: Any) -> None:
    """Check a recipe from a file: `rebuild_` trusts its structure. Call it inside `errors.reading`, which names the file.

    Args:
        recipe: The content of `config.secateur`.

    Raises:
        FieldError: A value is missing, or has another type than `Rebuild` writes.
    """
    require_type("recipe", dict[str, Any], recipe)
    for name, kind in _RECIPE.items():
        require_type(name, kind, recipe.get(name, {} if name != "own_position_bias" else []))
    if "modules" not in recipe:
        raise FieldError("recipe: expected 'modules', got none")
    for path, spec in recipe["modules"].items():
        if unknown := next((name for name in spec if name not in _MODULE), None):
            raise FieldError(f"modules, {path}: expected some of {', '.join(_MODULE)}, got {shown(unknown)}")
        for name, value in spec.items():
            require_type(f"modules, {path}, {name}", _MODULE[name], value)
        sizes = spec.get("embedding") or spec.get("linear") or []
        widths = [*sizes, spec.get("scatter", 0), spec.get("rank", 0)]
        if len(sizes) != 2 or not 0 <= min(widths) <= max(widths) <= _WIDEST:
            raise FieldError(f"modules, {path}: expected two sizes from 0 to {_WIDEST}, got {shown(widths)}")
        if "linear" in spec and "bias" not in spec:
            raise FieldError(f"modules, {path}: expected 'bias', got none")


_WIDEST = 2**31 - 1
# The types of a recipe's fields, and of the fields of one module.
_RECIPE: dict[str, Any] = {
    "modules": dict[str, dict[str, Any]], "attributes": dict[str, dict[str, bool | int | float]],
    "own_position_bias": list[str], "no_attention": dict[str, str | None],
}  # fmt: skip
_MODULE: dict[str, Any] = {
    "linear": list[int], "embedding": list[int], "bias": bool, "scatter": int, "rank": int,
    "gather": Literal[True], "transposed": Literal[True],
}  # fmt: skip
