"""Shared by the kernels' tests: the devices of the implementations, shapes, poisoned memory, and the largest allowed error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from secateur_kernels.backend import INTERPRETED

# test_kernels_interpreted.py runs the tests of the kernels in a process of its own, under Triton's interpreter.
GPU = torch.cuda.is_available() and not INTERPRETED
BACKENDS = ["triton"] if INTERPRETED else ["reference", pytest.param("triton", marks=pytest.mark.gpu)] if GPU else ["reference"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MASKS = [None, torch.bool, torch.int64, torch.float32]
# Batch and tokens: one, odd numbers, examples that cross the kernels' tiles, tiles with many examples, and zero.
TOKENS = [(1, 1), (3, 63), (2, 5), (7, 1), (2, 131), (5, 0), (0, 3)]


def device(backend: str) -> str:
    """Return the device on which a backend is tested."""
    return "cuda" if GPU and backend == "triton" else "cpu"


def random_mask(shape: tuple[int, int], dtype: torch.dtype | None, where: str = "cpu") -> Tensor | None:
    """Return a mask of zeros and ones. For a floating dtype, it has weights between zero and one instead of ones."""
    if dtype is None:
        return None
    mask = torch.rand(shape)
    mask = torch.where(mask > 0.3, mask if dtype.is_floating_point else torch.ones(()), torch.zeros(()))
    return mask.to(where, dtype)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill newly allocated memory with NaN inside the context, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_exact(output: Tensor, exact: Tensor, eager: Tensor, size: Tensor) -> None:
    """Check that the error against float64 is at most the largest error of eager PyTorch plus rounding in the output's dtype.

    `size` is the measure of an element's rounding: the sum of the absolute values of its terms.
    """
    assert output.shape == exact.shape
    output, eager, size = output.cpu(), eager.cpu(), size.cpu()
    if output.numel():
        allowed = (eager.double() - exact).abs().max() + torch.finfo(output.dtype).eps * size
        error = (output.double() - exact).abs()
        assert bool((error <= allowed).all()), f"error {float(error.max())}, allowed {float(allowed.max())}"
