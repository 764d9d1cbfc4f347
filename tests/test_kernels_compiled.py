"""Each kernel compiled ahead of time for three generations of GPUs: it compiles, spills no register, fits in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES

from secateur_kernels.backend import FOUND

if not FOUND:
    pytest.skip("triton is not installed", allow_module_level=True)

from compiled import SHARED, candidates, launches, usage  # noqa: E402


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product_sum(launch: Callable[..., Any], dtype: torch.dtype, channels: int) -> None:
    x = empty(8, 512, channels, dtype=dtype)
    launch(x, x, empty(8, 512, dtype=torch.bool))


CALLS = {"product_sum": product_sum}


@pytest.mark.parametrize("width", [123, 768], ids=lambda width: f"width{width}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", CALLS)
def test_compiles_ahead_of_time(operation: str, dtype: torch.dtype, width: int) -> None:
    module = import_module(f"secateur_kernels.{operation}.triton")
    found = launches(module, lambda: CALLS[operation](module.launch, dtype, width))
    assert found
    for launch in (candidate for each in found for candidate in candidates(each)):
        for capability, shared in SHARED.items():
            used = usage(launch, capability)
            assert used.local == 0, (launch.options, capability, used)
            assert used.shared <= shared, (launch.options, capability, used)
