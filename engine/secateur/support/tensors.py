"""Comparison of mappings of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def same_tensors(one: Mapping[str, Tensor] | None, other: Mapping[str, Tensor] | None) -> bool:
    """Return whether two mappings have the same names, and bit-identical tensors of the same dtypes. None equals only None."""
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
