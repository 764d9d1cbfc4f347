"""factorise: replace linear layers by layers of low rank, the baseline that pruning of units is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from secateur.model.discovery import branches_of, sites
from secateur.model.linear_layers import weight_of
from secateur.model.recipe import Rebuild
from secateur.planning.budget import Budget
from secateur.pruning.prune import rebuilt
from secateur.support.errors import InputError
from secateur_kernels.backend import accumulator


@torch.inference_mode(False)  # No inference tensors: the new model may outlive the caller's inference mode.
def factorise(model: nn.Module, keep: float, select: str | None = None) -> nn.Module:
    """Return a new model whose linear layers [d, k] have the rank floor(d * k * keep / (d + k + 1)).

    The model is saved and loaded like a pruned one.

    Args:
        model: The dense model. It stays unchanged.
        keep: The share of the weights that stays, in (0, 1]. A layer then holds rank * (d + k) weights, with the singular
            values multiplied into them, and its bias.
        select: As in `sites`. The linear layers of the selected sites' branches are factorised.

    Raises:
        InputError: keep is out of (0, 1], or too small for one singular value of a layer; a selection that `sites` refuses; the
            model's attention has lost channels; the model is factorised already.

    Reference:
        The SVD baseline of Yang et al. 2023 (arXiv 2205.04157).
    """
    Budget("keep", keep)  # Checks its range.
    rebuild, flags = Rebuild(), {}
    chosen = {branch.name: branch for branch in branches_of(model, sites(model, select=select)).values()}
    for path in (path for branch in chosen.values() for path in branch.linears):
        weight = weight_of(model.get_submodule(path))
        rebuild.low_rank(model, path, *factors(weight.detach(), _rank(path, weight, keep)))
        flags[f"{path}.basis.weight"] = weight.requires_grad
    factorised = rebuilt(model, rebuild)
    for name, flag in flags.items():
        factorised.get_parameter(name).requires_grad_(flag)
    return factorised


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return [d, rank] and [rank, k] with the product nearest to the weight [d, k] (Eckart and Young 1936)."""
    left, values, right = torch.linalg.svd(weight.to(accumulator(weight)), full_matrices=False)
    first, second = balanced(left[:, :rank], values[:rank], right[:rank])  # [d, rank], [rank, k]
    return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()


def balanced(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return [d, rank] and [rank, k] whose product is left diag(values) right.

    Each factor is multiplied by the square roots of the values, so that half precision holds both equally well. The first also
    has their signs.
    """
    roots = values.abs().sqrt()
    return left * (roots * values.sign()), roots.unsqueeze(1) * right


def _rank(path: str, weight: Tensor, keep: float) -> int:
    """Return the rank of a linear layer with this weight [d, k]."""
    rows, columns = weight.shape
    rank = math.floor(rows * columns * keep / (rows + columns + 1))
    if rank < 1:
        least = (rows + columns + 1) / (rows * columns)
        raise InputError(f"keep: expected at least {least:.4f}, with which {path} keeps one singular value, got {keep}")
    return rank
