"""Sizes of what the product kernels' launchers allocate. They are counted on shapes alone, without memory and without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur_kernels.backend import INSTALLED

if not INSTALLED:
    pytest.skip("needs triton", allow_module_level=True)

from secateur_kernels.tiles import partial_sums, sum_of_parts


def gradient(batch: int, tokens: int) -> Tensor:
    """Return a gradient [B, T, 1] without memory."""
    return torch.empty(batch, tokens, 1, device="meta")


def tiles_met(batch: int, tokens: int, size: int) -> list[int]:
    """Return how many tiles of `size` tokens each example meets."""
    return [((b + 1) * tokens - 1) // size - b * tokens // size + 1 for b in range(batch)]


@pytest.mark.parametrize("size", [64, 128])
def test_no_example_meets_more_tiles_than_there_are_places_and_one_meets_all(size: int) -> None:
    for tokens in range(1, 300):
        for batch in (1, 2, 5, size):
            places = partial_sums(gradient(batch, tokens), 1, {"TOKENS": size}).shape[1]
            most = max(tiles_met(batch, tokens, size))
            assert places == most if batch == size else places >= most, (batch, tokens)


@pytest.mark.parametrize(("batch", "tokens", "bytes_"), [(4096, 8, 234_881_024), (32768, 1, 1_879_048_192)])
def test_short_examples_need_no_more_than_their_scores(batch: int, tokens: int, bytes_: int) -> None:
    """F = 14336. The scores themselves are 4 B F bytes: nothing is allocated beside them, and nothing is copied."""
    partial = partial_sums(gradient(batch, tokens), 14336, {"TOKENS": 128})
    assert partial.nbytes == 4 * batch * 14336 == bytes_
    assert sum_of_parts(partial)._is_view()


@pytest.mark.parametrize("tokens", [1, 8, 100, 127, 128, 129, 256, 300, 512])
def test_places_that_no_tile_writes_are_zero(tokens: int) -> None:
    """Memory is filled with NaN, so that a place that is neither zeroed nor written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        partial = partial_sums(torch.empty(9, tokens, 1), 1, {"TOKENS": 128})
    finally:
        torch.use_deterministic_algorithms(False)
    written = torch.tensor(tiles_met(9, tokens, 128))[:, None] > torch.arange(partial.shape[1])  # [B, tiles]
    assert not partial[..., 0][~written].isnan().any()
