"""The choice between two implementations is timed once, kept on disk, and made without a GPU where none may be timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
chosen: Any = pytest.importorskip("secateur_kernels.chosen")

WAYS = {"slow": lambda: 3.0, "fast": lambda: 1.0}
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A device that times an implementation as what it returns, and the list of what was timed."""
    seen: list[float] = []

    def bench(run: Callable[[], float], **_: Any) -> float:
        seen.append(run())
        return seen[-1]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(chosen, "FIXED", False)
    monkeypatch.setattr(chosen, "do_bench", bench)
    monkeypatch.setattr(chosen, "_named", lambda device: "a device")
    monkeypatch.setattr(chosen, "_KNOWN", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


def test_the_fastest_is_timed_once_for_a_key(timed: list[float]) -> None:
    assert [chosen.chosen("op", {"rows": 16}, WAYS, DEVICE) for _ in range(3)] == ["fast"] * 3
    assert timed == [3.0, 1.0]
    assert chosen.chosen("op", {"rows": 32}, WAYS, DEVICE) == "fast"
    assert len(timed) == 4


def test_another_process_takes_the_same_one(timed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen.chosen("op", {"rows": 16}, WAYS, DEVICE)
    monkeypatch.setattr(chosen, "_KNOWN", {})
    monkeypatch.setattr(chosen, "do_bench", lambda *_, **__: pytest.fail("timed again"))
    assert chosen.chosen("op", {"rows": 16}, WAYS, DEVICE) == "fast"
    # An implementation that this call does not allow gives way to the first one.
    assert chosen.chosen("op", {"rows": 16}, {"slow": WAYS["slow"]}, DEVICE) == "slow"


def test_nothing_is_timed_where_the_tuning_is_fixed_or_a_graph_is_captured(
    timed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert chosen.chosen("op", {"rows": 16}, WAYS, DEVICE) == "slow"
    monkeypatch.setattr(chosen, "FIXED", True)
    assert chosen.chosen("op", {"rows": 16}, WAYS, DEVICE) == "slow"
    assert timed == []
