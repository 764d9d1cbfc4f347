"""Check that the paths and widths that a family tells are those of the model: a family may come from a user."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from secateur.model.branches import Branch
from secateur.model.families.base import Family
from secateur.model.linear_layers import is_transposed, shape_of
from secateur.support.errors import InputError


def checked(family: Family, model: nn.Module) -> Iterator[Branch]:
    """Yield a model's branches, as its family tells them.

    Raises:
        InputError: A branch lacks a field, the model lacks a module path or an attribute, linear layers have other widths
            than the branch, or two branches share a weight.
    """
    name = "/".join(family.model_types)
    try:
        of_family = list(family.branches(model))
    except (AttributeError, TypeError) as error:
        raise InputError(f"family: expected what the model {type(model).__name__} has, got from {name!r}: {error}") from error
    owners: dict[nn.Parameter, str] = {}
    for branch in of_family:
        for field, path, rows, columns in _expected(branch):
            _require(model, f"family: {name!r}, {branch.name}, {field}", path, rows, columns)
        for path in branch.linears:
            owner = owners.setdefault(model.get_submodule(path).get_parameter("weight"), branch.name)
            if owner != branch.name:
                raise InputError(
                    f"model: expected weights of its own in each branch, got {path!r} shared by {owner} and {branch.name}: "
                    "give each block a copy first (copy.deepcopy)"
                )
        yield branch


def _expected(branch: Branch) -> Iterator[tuple[str, str, int | None, int | None]]:
    """Yield the fields that are paths of linear layers, with the outputs and inputs that follow from the other fields."""
    widths = {(port.path, port.side): port.map.channels for port in branch.cut_whole()}
    for field, path in branch.linear_fields.items():
        yield field, path, widths.get((path, "output")), widths.get((path, "input"))


def _require(model: nn.Module, where: str, path: str, rows: int | None, columns: int | None) -> None:
    """Raise InputError unless a path leads to a linear layer with these outputs (rows) and inputs (columns)."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"{where}: expected the path of a module of the model, got {path!r} ({error})") from error
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        raise InputError(f"{where}: expected the path of a linear layer, got {path!r}, a {type(module).__name__}")
    if type(module) is not nn.Linear and not is_transposed(module):
        return  # A layer that pruning made, whose heads are wider than its weight, or a layer of another class.
    outputs, inputs = shape_of(module)
    if rows is not None and outputs != rows:
        raise InputError(f"{where}: expected {rows} outputs of {path!r}, got {outputs}")
    if columns is not None and inputs != columns:
        raise InputError(f"{where}: expected {columns} inputs of {path!r}, got {inputs}")
