"""Compile Triton kernels ahead of time, with the arguments of their launchers, and read what the binaries use. Needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # Bytes that one program can have (CUDA C Programming Guide).
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.bool: "*i1", torch.int64: "*i64"}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: its arguments by name, and the options of the launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Usage:
    """The resources of a binary.

    Attributes:
        registers: Registers per thread.
        local: Bytes of local memory, with spilled registers.
        shared: Bytes of shared memory.
        ptx: The PTX code.
    """

    registers: int
    local: int
    shared: int
    ptx: str = field(repr=False)


def launches(module: ModuleType, call: Callable[[], Any]) -> list[Launch]:
    """Return the launches of the module's kernels in a call. No launch runs."""
    recorded: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def record(*positional: Any, **named: Any) -> None:
                names = self.kernel.arg_names
                arguments = dict(zip(names, positional, strict=False)) | {k: v for k, v in named.items() if k in names}
                recorded.append(Launch(self.kernel, arguments, {k: v for k, v in named.items() if k not in names}))

            return record

    with pytest.MonkeyPatch.context() as patch:
        for name, value in vars(module).items():
            if hasattr(value, "arg_names"):
                patch.setattr(module, name, Recorder(value))
        call()
    return recorded


def candidates(launch: Launch) -> Iterator[Launch]:
    """Yield the launch with each candidate of the tuning."""
    if not hasattr(launch.kernel, "configs"):
        yield launch
        return
    for config in launch.kernel.configs:
        options = config.all_kwargs()
        arguments = launch.arguments | {k: v for k, v in options.items() if k in launch.kernel.arg_names}
        yield Launch(launch.kernel, arguments, launch.options | {k: v for k, v in options.items() if k not in arguments})


def usage(launch: Launch, capability: int) -> Usage:
    """Compile the launch for a compute capability, with the alignment that Triton assumes for these arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel.fn if hasattr(launch.kernel, "configs") else launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = {}
    for position, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
        elif name.isupper() or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if signature[name] not in ("constexpr", "fp32") and (isinstance(value, Tensor) or value % 16 == 0):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return _usage(compiled)


def _usage(compiled: Any) -> Usage:
    """Return the resources of a compiled kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Spilled registers lie on the stack.
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(resources["REG"], resources["STACK"] + resources["LOCAL"], compiled.metadata.shared, compiled.asm["ptx"])
