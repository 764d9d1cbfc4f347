"""What every test starts from: one thread, a fixed seed, small fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import CASES, Case
from command import run  # noqa: F401 A fixture of every test.
from torch import nn

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """A test's random numbers don't depend on which tests ran before, and it hands the default dtype back."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def t5_case() -> Case:
    return CASES["t5-gated"]


@pytest.fixture
def t5(t5_case: Case) -> nn.Module:
    return t5_case.model()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, visibly, where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
