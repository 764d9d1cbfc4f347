"""Selection of an exact number of largest values, with ties broken by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.support.errors import InputError

# From this many values on, a sample narrows down the threshold, so that only a few percent of the values are searched.
_LARGE = 1 << 16
_SAMPLE = 1 << 13


def largest(values: Tensor, count: int) -> Tensor:
    """Mark exactly `count` values: the largest. Of equal values, the first ones are marked.

    Args:
        values: Floating point [n].
        count: The number of values to mark, from 0 to n.

    Returns:
        bool [n], True at the marked values.

    Raises:
        InputError: The count is out of range, or there are fewer values that are not NaN.
    """
    if not 0 <= count <= values.numel():
        raise InputError(f"count: expected 0 to {values.numel()}, got {count}")
    if count in (0, values.numel()):
        return torch.full_like(values, bool(count), dtype=torch.bool)
    threshold = _threshold(values, count)
    chosen = values >= threshold  # [n]
    excess = int(torch.count_nonzero(chosen)) - count
    if excess < 0:
        raise InputError(f"values: expected at least {count} that are not NaN, got {int(values.isnan().sum())} NaN")
    if excess:
        chosen[(values == threshold).nonzero().flatten()[-excess:]] = False
    return chosen


def _threshold(values: Tensor, count: int) -> Tensor:
    """Return the count-th largest value."""
    total = values.numel()
    if total > _LARGE:
        sample = values[:: total // _SAMPLE].sort().values
        # The count-th largest value usually lies within five standard deviations of its place in the sample. If it does not,
        # all values are searched.
        place = (1 - count / total) * len(sample)
        margin = 5 * math.sqrt(len(sample) * count / total * (1 - count / total)) + 5
        low, high = sample[max(int(place - margin), 0)], sample[min(int(place + margin), len(sample) - 1)]
        above = values > high
        inside, above_count = values[(values >= low) ^ above], int(torch.count_nonzero(above))
        if above_count < count <= above_count + inside.numel():
            values, count = inside, count - above_count
    return values.kthvalue(values.numel() - count + 1).values
