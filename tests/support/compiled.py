"""Compile Triton kernels ahead of time, as their launchers call them, and read what the binaries use. Needs no GPU."""

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
    """One call of a kernel: its arguments by name, and the launch's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Usage:
    """What a binary uses: registers of a thread, bytes of local memory (spills among them), bytes of shared memory. Its PTX."""

    registers: int
    local: int
    shared: int
    ptx: str = field(repr=False)


def launches(module: ModuleType, call: Callable[[], Any]) -> list[Launch]:
    """The launches that a call makes of the module's kernels. No launch is carried out."""
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
    """The launch, once with every set of options that tuning chooses from."""
    if not hasattr(launch.kernel, "configs"):
        yield launch
        return
    for config in launch.kernel.configs:
        options = config.all_kwargs()
        arguments = launch.arguments | {k: v for k, v in options.items() if k in launch.kernel.arg_names}
        yield Launch(launch.kernel, arguments, launch.options | {k: v for k, v in options.items() if k not in arguments})


def usage(launch: Launch, capability: int) -> Usage:
    """Compile the launch for a compute capability, with what Triton assumes of these arguments."""
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
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The stack holds spilled registers.
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, compiled.asm["ptx"])
