"""Shared by the tests of the kernels: devices of the implementations, shapes, poisoned memory, and the error allowed."""

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
# Batch and tokens: one of each, odd numbers, examples that cross the kernels' tiles, tiles with many examples, nothing at all.
TOKENS = [(1, 1), (3, 63), (2, 5), (7, 1), (2, 131), (5, 0), (0, 3)]


def device(backend: str) -> str:
    return "cuda" if GPU and backend == "triton" else "cpu"


def random_mask(shape: tuple[int, int], dtype: torch.dtype | None, where: str = "cpu") -> Tensor | None:
    """Zeros and ones; for a floating dtype weights between."""
    if dtype is None:
        return None
    mask = torch.rand(shape)
    mask = torch.where(mask > 0.3, mask if dtype.is_floating_point else torch.ones(()), torch.zeros(()))
    return mask.to(where, dtype)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing has written holds NaN inside this context."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_exact(found: Tensor, exact: Tensor, eager: Tensor, size: Tensor) -> None:
    """The error against float64 is at most that of eager PyTorch (its largest) and rounding in the dtype that was found.

    size: what each element's rounding is measured by, the sum of its terms' absolute values.
    """
    assert found.shape == exact.shape
    found, eager, size = found.cpu(), eager.cpu(), size.cpu()
    if found.numel():
        allowed = (eager.double() - exact).abs().max() + torch.finfo(found.dtype).eps * size
        error = (found.double() - exact).abs()
        assert bool((error <= allowed).all()), f"error {float(error.max())}, allowed {float(allowed.max())}"
