"""Match the branches and the blocks of a pruned model with those of the dense model that it was pruned from."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from secateur.model.blocks import Block, blocks
from secateur.model.branches import Branch
from secateur.model.families import branches
from secateur.model.removed_blocks import staying
from secateur.support.errors import InputError


def branches_of_dense(model: nn.Module, pruned: nn.Module, removed: Collection[str]) -> dict[Branch, Branch]:
    """Return for each branch of the pruned model the one of the dense model. Raises InputError where they do not match."""
    staying(model, removed)  # Checks the names.
    of_dense = [branch for block in blocks(model).values() if block.name not in removed for branch in block.branches]
    of_pruned = list(branches(pruned).values())
    if [(branch.stack, branch.kind) for branch in of_dense] != [(branch.stack, branch.kind) for branch in of_pruned]:
        without = f" without {', '.join(removed)}" if removed else "; removed_blocks names blocks that its plan removed"
        raise InputError(f"pruned: expected a model pruned from the dense one, got one with other branches{without}")
    return dict(zip(of_pruned, of_dense, strict=True))


def require_order(model: nn.Module, pruned: nn.Module, of_dense: Mapping[Branch, Branch]) -> None:
    """Raise InputError where the models are one, or a branch has more weights in the second model than in the first."""
    if model is pruned:
        raise InputError("pruned: expected a model pruned from the dense one, got the dense model itself")
    for branch, dense in of_dense.items():
        name, ours, theirs = dense.name, _weights(pruned, branch), _weights(model, dense)
        if ours > theirs:
            raise InputError(
                "pruned: expected the dense model first and the pruned one second, got a pruned model with more weights in "
                f"{name} than the dense model has ({ours} and {theirs})"
            )


def _weights(model: nn.Module, branch: Branch) -> int:
    """Return the number of weights in the linear layers of a branch. Biases do not count: `add_biases` adds some."""
    layers = [model.get_submodule(path) for path in branch.linears]
    parameters = [named for layer in layers for named in layer.named_parameters()]
    return sum(parameter.numel() for name, parameter in parameters if name.rpartition(".")[2] != "bias")


def blocks_of_dense(model: nn.Module, pruned: nn.Module, removed: Collection[str]) -> list[tuple[Block, Block]]:
    """Return the blocks of the pruned model, each with the one of the dense model, in the order of the forward pass.

    Raises:
        InputError: As `branches_of_dense`.
    """
    branches_of_dense(model, pruned, removed)
    of_dense = [block for block in blocks(model).values() if block.name not in removed]
    return list(zip(blocks(pruned).values(), of_dense, strict=True))
