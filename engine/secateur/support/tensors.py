"""Comparison of tensors, and their way to the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name")


def same_tensors(one: Mapping[str, Tensor] | None, other: Mapping[str, Tensor] | None) -> bool:
    """Return whether two mappings have the same names, and bit-identical tensors of the same dtypes. None equals only None."""
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def nearest(actual: Tensor, candidates: Iterable[tuple[Name, Tensor, Tensor]]) -> Name | None:
    """Return which expected tensor comes nearest to a tensor, of those whose error rounding explains.

    All errors reach the CPU in one transfer.

    Args:
        actual: The tensor.
        candidates: Names, expected tensors and limits, all of one shape and one dtype that is wide enough for their difference.
            A limit is the largest error that rounding explains. Errors of rounding do not add up in one direction, so the
            root of the mean square must be within a quarter of the limit's.

    Returns:
        The name of the candidate with the least sum of errors among those within their limits; None if there is none.
    """
    names, figures = [], []
    for name, expected, limit in candidates:
        error = (actual.to(expected.dtype) - expected).abs()
        names.append(name)
        figures.append(torch.stack([(error - limit).amax(), error.norm() - limit.norm() / 4, error.sum()]))
    found = [(total, k) for k, (most, mean, total) in enumerate(torch.stack(figures).tolist()) if most <= 0 and mean <= 0]
    return names[min(found)[1]] if found else None


def on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the CPU, all tensors of one device and dtype in one transfer. Each transfer waits for the device.

    Args:
        tensors: The tensors, of any shapes.

    Returns:
        The tensors on the CPU, in the same order. Those that were there already are returned themselves.
    """
    moved = list(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for k, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            groups.setdefault((tensor.device, tensor.dtype), []).append(k)
    for group in groups.values():
        flat = torch.cat([tensors[k].flatten() for k in group]).cpu()
        for k, part in zip(group, torch.split(flat, [tensors[k].numel() for k in group]), strict=True):
            moved[k] = part.view(tensors[k].shape)
    return moved


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products keep the dtype of their factors, also where the caller's autocast is on.

    Args:
        device: The device of the products.
    """
    if not torch.amp.is_autocast_available(device.type):  # The meta device has no autocast.
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
