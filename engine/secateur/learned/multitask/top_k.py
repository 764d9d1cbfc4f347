"""Which values are the largest: an exact number of them, ties broken by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.support.errors import InputError

# From here on a sample tells where the threshold lies, so that only a few percent of the values are searched for it.
_LARGE = 1 << 16
_SAMPLE = 1 << 13


def largest(values: Tensor, count: int) -> Tensor:
    """Bool [n] with exactly `count` of the values [n] marked: the largest, and of equal ones those that come first.

    Raises InputError: a count that is negative or beyond n, or beyond the values that are numbers.
    """
    if not 0 <= count <= values.numel():
        raise InputError(f"count: expected 0 to {values.numel()}, got {count}")
    if count in (0, values.numel()):
        return torch.full_like(values, bool(count), dtype=torch.bool)
    threshold = _threshold(values, count)
    chosen = values >= threshold
    beyond = int(torch.count_nonzero(chosen)) - count
    if beyond < 0:
        raise InputError(f"values: expected at least {count} numbers, got {int(values.isnan().sum())} that are none")
    if beyond:
        chosen[(values == threshold).nonzero().flatten()[-beyond:]] = False
    return chosen


def _threshold(values: Tensor, count: int) -> Tensor:
    """The count-th largest value."""
    total = values.numel()
    if total > _LARGE:
        sample = values[:: total // _SAMPLE].sort().values
        # The count-th largest lies within five standard deviations of its place in the sample; where not, all are searched.
        place = (1 - count / total) * len(sample)
        margin = 5 * math.sqrt(len(sample) * count / total * (1 - count / total)) + 5
        low, high = sample[max(int(place - margin), 0)], sample[min(int(place + margin), len(sample) - 1)]
        above = values > high
        inside, beyond = values[(values >= low) ^ above], int(torch.count_nonzero(above))
        if beyond < count <= beyond + inside.numel():
            values, count = inside, count - beyond
    return values.kthvalue(values.numel() - count + 1).values
