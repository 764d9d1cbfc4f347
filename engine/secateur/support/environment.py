"""The machine and the versions of a measurement: the device, the CPU, PyTorch."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

_PRODUCTS = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")  # The fastest first.


def environment(model: nn.Module) -> dict[str, Any]:
    """Device, processor, dtype, threads and versions of a measurement."""
    import transformers

    parameter = next(model.parameters())
    cuda = parameter.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(parameter.device) if cuda else f"CPU ({platform.machine()})",
        "processor": cpu_name(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def capabilities() -> dict[str, Any]:
    """torch.cpu.get_capabilities; of older releases, which tell none, empty."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def cpu_name() -> str:
    """The CPU's name, as far as a virtual machine tells it, and the fastest of its instructions for matrix products."""
    name = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    able = capabilities()
    fastest = next((each for each in _PRODUCTS if able.get(each)), None)
    return ", ".join(filter(None, (name, fastest)))
