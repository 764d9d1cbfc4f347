"""Set-up of every test: one thread, a fixed seed, markers by folder, and shared fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import CASES, Case
from command import run  # noqa: F401 A fixture that every test may use.
from torch import nn

torch.set_num_threads(1)

TESTS = Path(__file__).parent
# Folders whose tests get a marker with the folder's name: `-m cli`, `-m "not learned"`.
MARKED_FOLDERS = ("cli", "kernels", "learned", "corpus")
# Files of other folders that `make check` leaves out by the marker `long`: a file takes more than 25 seconds of one core.
LONG_FILES = (
    "attribution/test_ranks.py",
    "attribution/test_attribute.py",
    "attribution/test_criteria.py",
    "attribution/test_integrated_gradients.py",
    "docs/test_guides.py",
    "docs/test_readme.py",
    "exporting/test_graphs.py",
    "measuring/test_dry_run.py",
    "measuring/test_latency.py",
    "model/test_sites.py",
    "pruning/test_save.py",
    "pruning/test_delete_layers.py",
    "pruning/test_task_plans.py",
    "pruning/test_prune.py",
    "reproduction/test_reproduction.py",
    "reproduction/test_reproduction_ldnet.py",
    "reproduction/test_reproduction_multitask.py",
    "tasks/test_tasks.py",
)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Seed torch, so that random numbers do not depend on earlier tests. Check that a test restores the default dtype."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def t5_case() -> Case:
    """The case of a T5 with a gated FFN."""
    return CASES["t5-gated"]


@pytest.fixture
def t5(t5_case: Case) -> nn.Module:
    """A T5 with a gated FFN."""
    return t5_case.model()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder and by file. Skip tests marked `gpu` where there is no CUDA device."""
    if missing := [name for name in LONG_FILES if not (TESTS / name).is_file()]:
        raise pytest.UsageError(f"LONG_FILES: expected files of tests, got {', '.join(missing)}")
    for item in items:
        name = item.path.relative_to(TESTS).as_posix()
        folder = name.partition("/")[0]
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)
        if name in LONG_FILES:
            item.add_marker("long")
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
