"""factorise: linear layers of low rank by their singular values, what pruning of units is compared with."""

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


def factorise(model: nn.Module, keep: float, select: str | None = None) -> nn.Module:
    """A new model whose linear layers [d, k] have the rank floor(d * k * keep / (d + k + 1)); the given one is untouched.

    The SVD baseline of Yang et al. 2023 (arXiv 2205.04157), with keep as the share of the weights that stays: a layer holds
    rank * (d + k) of them, the singular values within, and its bias. select: as in `sites`; layers are those of the branches
    that it chooses. The model is saved and loaded like a pruned one.
    Raises InputError: keep out of (0, 1], or too little for one singular value of a layer; a selection as in `sites`; a
    model whose attention has lost channels, or that is factorised already.
    """
    Budget("keep", keep)  # Checks its range.
    rebuild, flags = Rebuild(), {}
    chosen = {branch.name: branch for branch in branches_of(model, sites(model, select=select)).values()}
    for path in (path for branch in chosen.values() for path in branch.linears):
        weight = weight_of(model.get_submodule(path))
        rebuild.low_rank(model, path, *factors(weight.detach(), _rank(path, weight, keep)))
        flags[f"{path}.basis"] = weight.requires_grad
    made = rebuilt(model, rebuild)
    for name, flag in flags.items():
        made.get_parameter(name).requires_grad_(flag)
    return made


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[d, rank] and [rank, k], whose product is nearest to the weight [d, k] (Eckart and Young 1936)."""
    left, values, right = torch.linalg.svd(weight.to(accumulator(weight)), full_matrices=False)
    found = balanced(left[:, :rank], values[:rank], right[:rank])
    return found[0].to(weight.dtype).contiguous(), found[1].to(weight.dtype).contiguous()


def balanced(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """[d, rank] and [rank, k], whose product is left diag(values) right. Each has the roots of the values, so that half
    precision holds both alike; the first has their signs."""
    roots = values.abs().sqrt()
    return left * (roots * values.sign()), roots.unsqueeze(1) * right


def _rank(path: str, weight: Tensor, keep: float) -> int:
    rows, columns = weight.shape
    rank = math.floor(rows * columns * keep / (rows + columns + 1))
    if rank < 1:
        least = (rows + columns + 1) / (rows * columns)
        raise InputError(f"keep: expected at least {least:.4f}, with which {path} keeps one singular value, got {keep}")
    return rank
