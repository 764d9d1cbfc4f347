"""Blocks: the layers of a model with the branches that add to its residual stream, and gates on what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.model.branches import Branch
from secateur.model.families import Contribution, branches, family_of, split_token_rows
from secateur.model.sites import Stack
from secateur.support.errors import InputError

LayerUnit = Literal["block", "branch"]
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """One block: for example "encoder.0", the module list that holds it, and its branches, in the order of the forward pass."""

    stack: Stack
    layer: int
    layers: str
    branches: tuple[Branch, ...]

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.layer}"

    @property
    def path(self) -> str:
        """The path of its module."""
        return f"{self.layers}.{self.layer}"


def blocks(model: nn.Module) -> dict[str, Block]:
    """A model's blocks by name, in the order of its forward pass. Raises InputError for an unknown family."""
    found: dict[tuple[Stack, int], list[Branch]] = {}
    for branch in branches(model).values():
        found.setdefault((branch.stack, branch.layer), []).append(branch)
    made = [Block(stack, layer, _layers(model, of[0]), tuple(of)) for (stack, layer), of in found.items()]
    return {block.name: block for block in made}


def layers(model: nn.Module, unit: LayerUnit = "block") -> dict[str, tuple[Branch, ...]]:
    """What can be gated and deleted, by name: each block's branches ("encoder.0"), or each branch alone ("encoder.0.ffn").

    Branches that nothing is left of are not among them, nor blocks without others.
    Raises InputError: an unknown unit or family, a model with nothing left to delete.
    """
    if unit not in ("block", "branch"):
        raise InputError(f"unit: expected 'block' or 'branch', got {unit!r}")
    found: dict[str, tuple[Branch, ...]] = {}
    for block in blocks(model).values():
        left = tuple(branch for branch in block.branches if contributes(model, branch))
        if unit == "branch":
            found |= {branch.name: (branch,) for branch in left}
        elif left:
            found[block.name] = left
    if not found:
        raise InputError("model: expected one with layers left to delete, got one whose branches are all empty")
    return found


def contributes(model: nn.Module, branch: Branch) -> bool:
    """Whether a branch adds anything: without units its out-projection still gives its bias."""
    return not branch.empty or getattr(model.get_submodule(branch.output), "bias", None) is not None


def contribution(model: nn.Module, branch: Branch) -> Contribution:
    """Where what the branch adds to the residual stream can be had."""
    return family_of(model).contribution(model, branch)


def attach(model: nn.Module, transforms: Mapping[str, Transform]) -> list[RemovableHandle]:
    """Replaces the output of the module at each path by what its function makes of it, until the handles are removed."""
    # In front of other hooks, so that it sees the activations by example.
    return [
        *split_token_rows(model),
        *(model.get_submodule(path).register_forward_hook(_after(t), prepend=True) for path, t in transforms.items()),
    ]


@contextmanager
def transformed(model: nn.Module, transforms: Mapping[Branch, Transform]) -> Iterator[None]:
    """Inside, what each branch adds to the residual stream goes through its function."""
    handles = attach(model, {contribution(model, branch).path: transform for branch, transform in transforms.items()})
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gated(model: nn.Module, gates: Mapping[Branch, Tensor]) -> Iterator[None]:
    """Inside, what each branch adds to the residual stream is multiplied by its gate: one for all, or one an example [B]."""
    with transformed(model, {branch: _by(gate) for branch, gate in gates.items()}):
        yield


def times(added: Tensor, gate: Tensor) -> Tensor:
    """added [B, T, channels] times a gate [1] or [B], in the gate's dtype first: rounded to 8 bits it would be another gate."""
    return (added * gate.view(-1, *[1] * (added.dim() - 1))).to(added.dtype)


def _by(gate: Tensor) -> Transform:
    return lambda added: times(added, gate)


def _after(transform: Transform) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda module, arguments, output: transform(output)


def _layers(model: nn.Module, branch: Branch) -> str:
    """The path of the module list whose item `branch.layer` holds the branch: the outermost one on the way to it."""
    names = branch.output.split(".")
    for depth in range(1, len(names)):
        path = ".".join(names[:depth])
        if names[depth] == str(branch.layer) and isinstance(model.get_submodule(path), nn.ModuleList):
            return path
    raise InputError(f"model: expected {branch.output!r} in a list of blocks at number {branch.layer}, got none")
