"""The machine and the software versions of a measurement: the device, the CPU, PyTorch."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.support.errors import InputError

# The CPU's instruction sets for matrix products, the fastest first.
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")

# What errors of writing say: the system's numbers of "no space", "file too large" and "quota exceeded", and torch.save's words.
_FULL = ("(os error 28)", "(os error 27)", "(os error 122)", "iostream error", "PytorchStreamWriter failed writing")


def environment(model: nn.Module) -> dict[str, Any]:
    """Describe the environment of a measurement.

    Args:
        model: The model that is measured.

    Returns:
        The device, the processor, the model's dtype, the number of threads and the versions, as JSON values.
    """
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


def require_threads(threads: int) -> None:
    """Check a number of CPU threads. OpenMP ends the process where the system refuses to start a thread.

    Args:
        threads: The number.

    Raises:
        InputError: There are fewer threads than one, or more than 64 and than four for each core.
    """
    most = max(64, 4 * (os.cpu_count() or 1))
    if not 1 <= threads <= most:
        raise InputError(f"threads: expected 1 to {most} on this machine, got {threads}")


def capabilities() -> dict[str, Any]:
    """Return the CPU's capabilities by `torch.cpu.get_capabilities`; empty in older releases, which lack this function."""
    by_name: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return by_name


def cpu_name() -> str:
    """Return the CPU's name, as a virtual machine reports it, and its fastest instruction set for matrix products."""
    name = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    available = capabilities()
    fastest = next((instructions for instructions in _INSTRUCTIONS if available.get(instructions)), None)
    return ", ".join(filter(None, (name, fastest)))


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out. The errors of the CPU's allocator have no type of their own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error of safetensors, tokenizers or torch.save says that a disk, a quota or a file size is full."""
    return any(words in str(error) for words in _FULL)
