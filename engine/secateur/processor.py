"""Which CPU this is: its name, and the instructions that it has for matrix products."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

_PRODUCTS = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")  # The fastest first.


def capabilities() -> dict[str, Any]:
    """torch.cpu.get_capabilities; of older releases, which tell none, empty."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def processor() -> str:
    """The CPU's name, as far as a virtual machine tells it, and the fastest of its instructions for matrix products."""
    name = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    able = capabilities()
    fastest = next((each for each in _PRODUCTS if able.get(each)), None)
    return ", ".join(filter(None, (name, fastest)))
