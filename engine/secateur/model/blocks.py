"""Blocks: the layers of a model with the branches that add to its residual stream, and gates on the branches' outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.model.branches import Branch
from secateur.model.families import Contribution, branches, family_of, split_token_rows
from secateur.model.ordinary import require_ordinary
from secateur.model.sites import Stack
from secateur.support.errors import InputError

LayerUnit = Literal["block", "branch"]
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """One block, for example "encoder.0".

    Attributes:
        stack: The stack that the block belongs to.
        layer: The number of the block in its stack, from 0.
        layers: The path of the module list that holds the block.
        branches: Its branches, in the order of the forward pass.
    """

    stack: Stack
    layer: int
    layers: str
    branches: tuple[Branch, ...]

    @property
    def name(self) -> str:
        """The name of the block."""
        return f"{self.stack}.{self.layer}"

    @property
    def path(self) -> str:
        """The path of the block's module."""
        return f"{self.layers}.{self.layer}"


def blocks(model: nn.Module) -> dict[str, Block]:
    """Return a model's blocks by name, in the order of its forward pass. Raises InputError for an unknown family."""
    by_place: dict[tuple[Stack, int], list[Branch]] = {}
    for branch in branches(model).values():
        by_place.setdefault((branch.stack, branch.layer), []).append(branch)
    of_model = [Block(stack, layer, _layers(model, of[0]), tuple(of)) for (stack, layer), of in by_place.items()]
    return {block.name: block for block in of_model}


def block_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters that go with each block, norms and biases included.

    An embedding in a block stays: T5's blocks share the table of positions that the first one holds.
    """
    return {
        name: sum(
            parameter.numel()
            for module in model.get_submodule(block.path).modules()
            if not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False)
        )
        for name, block in blocks(model).items()
    }


def layers(model: nn.Module, unit: LayerUnit = "block") -> dict[str, tuple[Branch, ...]]:
    """Return the layers that can be gated and deleted, by name, each with its branches.

    Branches that add nothing are left out, and so are blocks without any other branch.

    Args:
        model: The model.
        unit: "block" for whole blocks ("encoder.0"), or "branch" for each branch alone ("encoder.0.ffn").

    Raises:
        InputError: The unit or the family is unknown, the model has nothing left to delete, or `require_ordinary` refuses it.
    """
    if unit not in ("block", "branch"):
        raise InputError(f"unit: expected 'block' or 'branch', got {unit!r}")
    require_ordinary(model)
    by_name: dict[str, tuple[Branch, ...]] = {}
    for block in blocks(model).values():
        left = tuple(branch for branch in block.branches if contributes(model, branch))
        if unit == "branch":
            by_name |= {branch.name: (branch,) for branch in left}
        elif left:
            by_name[block.name] = left
    if not by_name:
        raise InputError("model: expected one with layers left to delete, got one whose branches are all empty")
    return by_name


def contributes(model: nn.Module, branch: Branch) -> bool:
    """Return whether a branch adds anything. Without units its out-projection still returns its bias."""
    return not branch.empty or getattr(model.get_submodule(branch.output), "bias", None) is not None


def contribution(model: nn.Module, branch: Branch) -> Contribution:
    """Return the module whose output is what the branch adds to the residual stream."""
    return family_of(model).contribution(model, branch)


def attach(model: nn.Module, transforms: Mapping[str, Transform]) -> list[RemovableHandle]:
    """Replace the output of the module at each path by its transform of it, until the handles are removed."""
    # Before other hooks, so that the transform sees [B, T, channels] and not all tokens in one row.
    return [
        *split_token_rows(model),
        *(model.get_submodule(path).register_forward_hook(_after(t), prepend=True) for path, t in transforms.items()),
    ]


@contextmanager
def transformed(model: nn.Module, transforms: Mapping[Branch, Transform]) -> Iterator[None]:
    """A context in which a transform changes what each branch adds to the residual stream."""
    handles = attach(model, {contribution(model, branch).path: transform for branch, transform in transforms.items()})
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gated(model: nn.Module, gates: Mapping[Branch, Tensor]) -> Iterator[None]:
    """A context in which gates multiply what branches add to the residual stream: one for all [1], or one an example [B]."""
    with transformed(model, {branch: _by(gate) for branch, gate in gates.items()}):
        yield


def times(added: Tensor, gate: Tensor) -> Tensor:
    """Return added [B, T, channels] times a gate [1] or [B], in the dtype of `added`.

    The product has the gate's dtype first: a gate rounded to 8 bits would be another gate.
    """
    return (added * gate.view(-1, *[1] * (added.dim() - 1))).to(added.dtype)


def _by(gate: Tensor) -> Transform:
    return lambda added: times(added, gate)


def _after(transform: Transform) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda module, arguments, output: transform(output)


def _layers(model: nn.Module, branch: Branch) -> str:
    """Return the path of the outermost module list whose item `branch.layer` holds the branch."""
    names = branch.output.split(".")
    for depth in range(1, len(names)):
        path = ".".join(names[:depth])
        if names[depth] == str(branch.layer) and isinstance(model.get_submodule(path), nn.ModuleList):
            return path
    raise InputError(f"model: expected {branch.output!r} in a list of blocks at number {branch.layer}, got none")
