"""The processor's name in measurements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.support.environment import cpu_name

CPUINFO = Path("/proc/cpuinfo")
LINES = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
NAMES = [line.partition(":")[2].strip() for line in LINES if line.startswith("model name")]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True, "avx512_bf16": True}, "amx_bf16"), ({"amx_bf16": False, "avx2": True}, "avx2")],
    ids=["the fastest", "the only one"],
)
def test_the_name_ends_with_the_fastest_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_name().rpartition(", ")[2] == expected


@pytest.mark.skipif(not NAMES, reason="needs Linux's names of CPUs")
def test_without_instructions_the_name_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # As in older releases of torch.
    assert cpu_name() in NAMES
