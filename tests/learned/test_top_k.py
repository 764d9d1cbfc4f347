"""largest: an exact number of largest values, ties by index, also if a sample narrows down the threshold."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secateur import InputError
from secateur.learned.multitask.top_k import _SAMPLE, largest

# Large enough for a sample to be taken; odd, so that the sample's stride does not divide it.
MANY = (1 << 18) + 12_345


def naive(values: Tensor, count: int) -> Tensor:
    """Mark the first `count` values of a stable sort: largest first, equal ones by index."""
    numbers = values.tolist()
    order = sorted(range(len(numbers)), key=lambda index: (-numbers[index], index))
    chosen = torch.zeros(len(numbers), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("distinct", [1, 2, 5, 1000])
def test_as_a_stable_sort_says(distinct: int, dtype: torch.dtype) -> None:
    for size in (1, 2, 3, 17, 100):
        for draw in range(5):
            values = torch.randint(-distinct // 2, distinct, (size,)).to(dtype)
            for count in {0, 1, size // 3, size // 2, size - 1, size, draw % (size + 1)}:
                marked = largest(values, count)
                assert marked.dtype == torch.bool
                assert torch.equal(marked, naive(values, count)), (values, count)


def rising(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32)


ADVERSARIAL: dict[str, Callable[[], Tensor]] = {
    "random": lambda: torch.randn(MANY),
    "many ties": lambda: torch.randint(0, 50, (MANY,)).float(),
    "all equal": lambda: torch.full((MANY,), 3.0),
    "rising": lambda: rising(MANY),
    "falling": lambda: rising(MANY).flip(0),
    "two values": lambda: (torch.rand(MANY) < 0.3).float(),
    "two values in order": lambda: (rising(MANY) < 1000).float(),
    "heavy tails": lambda: torch.randn(MANY) / torch.randn(MANY),
    "infinities": lambda: torch.randn(MANY).masked_fill(torch.rand(MANY) < 0.2, math.inf),
    "both infinities": lambda: torch.randn(MANY).masked_fill(torch.rand(MANY) < 0.2, math.inf) * torch.randn(MANY).sign(),
    "all but a few at zero": lambda: torch.zeros(MANY).index_fill_(0, torch.randint(0, MANY, (100,)), 1.0),
    # All values in the sample are large, and all other values are not. So the sample does not show the threshold.
    "what the sample sees is large": lambda: torch.rand(MANY) + (rising(MANY) % (MANY // _SAMPLE) == 0) * 10,
    "what the sample sees is small": lambda: torch.rand(MANY) - (rising(MANY) % (MANY // _SAMPLE) == 0) * 10,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_large_tensor_is_searched_as_exactly(name: str) -> None:
    values = ADVERSARIAL[name]()
    order = values.argsort(descending=True, stable=True)
    for count in (1, 2, 100, MANY // 10, MANY // 4, MANY // 2, MANY - 100, MANY - 1):
        expected = torch.zeros(MANY, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(largest(values, count), expected), count


@pytest.mark.parametrize("size", [0, 1, 10, MANY])
def test_none_and_all(size: int) -> None:
    values = torch.randn(size)
    assert not largest(values, 0).any()
    assert largest(values, size).all()


def test_the_values_stay_as_they_are() -> None:
    values = torch.randn(1000)
    before = values.clone()
    largest(values, 300)
    assert torch.equal(values, before)


@pytest.mark.parametrize("count", [-1, 11])
def test_a_count_beyond_the_values_is_refused(count: int) -> None:
    with pytest.raises(InputError, match=rf"^count: expected 0 to 10, got {count}$"):
        largest(torch.randn(10), count)


def test_values_that_are_no_numbers_are_refused() -> None:
    """Otherwise a diverged run would continue with another density than requested."""
    values = torch.randn(10).index_fill_(0, torch.tensor([2, 5, 7]), math.nan)
    with pytest.raises(InputError, match=r"^values: expected at least 8 that are not NaN, got 3 NaN$"):
        largest(values, 8)
