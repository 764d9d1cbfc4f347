"""Compile Triton kernels ahead of time, with the arguments of their launchers, and count what binaries use, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur_kernels.backend import Device

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.bool: "*i1", torch.int64: "*i64"}


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        arch: The compute capability as a number, or the name of AMD's architecture.
        device: What tiles depend on.
        registers: Registers of a multiprocessor, 32 bits each. AMD's compute units have four times 512 for each of 64 threads.
        shared: Bytes of shared memory of a multiprocessor.
        threads: Threads that a multiprocessor holds.
        warp: Threads of a warp.
    """

    arch: int | str
    device: Device
    registers: int
    shared: int
    threads: int
    warp: int = 32


# CUDA C Programming Guide, table of compute capabilities. AMD CDNA 3 ISA, and the MI300X data sheet.
TARGETS = {
    "sm_75": Target(75, Device((7, 5), 64 * 1024), 65536, 64 * 1024, 1024),
    "sm_80": Target(80, Device((8, 0), 163 * 1024), 65536, 164 * 1024, 2048),
    "sm_90": Target(90, Device((9, 0), 227 * 1024), 65536, 228 * 1024, 2048),
    "sm_100": Target(100, Device((10, 0), 227 * 1024), 65536, 228 * 1024, 2048),
    "gfx942": Target("gfx942", Device((9, 4), 64 * 1024, amd=True), 131072, 64 * 1024, 2048, warp=64),
}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: its arguments by name, and the options of the launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Case:
    """One launch to compile: an operation on a number format, a model's widths and an activation.

    Attributes:
        operation: The folder of the kernel.
        dtype: The dtype's name in torch.
        width: D.
        neurons: F.
        activation: For `scored_mlp_backward`. "gelu_new" and "silu" are gated MLPs, the others plain.
        backward: Whether the launch is the operation's backward kernel.
        tf32: Whether float32 products may use tf32.
        zeros: Whether the backward kernel of `interpolated_norm` gives the gradient at `zeros` alone, as integrated gradients
            ask for.
    """

    operation: str
    dtype: str
    width: int
    neurons: int
    activation: str = ""
    backward: bool = False
    tf32: bool = False
    zeros: bool = False

    def __str__(self) -> str:
        gated = "gated " if self.activation in GATED else ""
        words = [self.operation, "backward" if self.backward else "", "zeros" if self.zeros else "", gated + self.activation]
        words += ["tf32" if self.tf32 else self.dtype, f"D={self.width} F={self.neurons}"]
        return " ".join(word for word in words if word)


GATED = ("gelu_new", "silu")
SHAPES = ((768, 3072), (4096, 14336))  # BERT-base and T5-base; Llama-8B.
KERNELS: tuple[dict[str, Any], ...] = (
    {"operation": "product_sum"},
    {"operation": "neuron_attribution"},
    *({"operation": "scored_mlp_backward", "activation": name} for name in ("relu", "gelu", "gelu_new", "silu")),
    {"operation": "interpolated_norm"},
    {"operation": "interpolated_norm", "backward": True},
    {"operation": "interpolated_norm", "backward": True, "zeros": True},
)
CASES = [
    *(Case(dtype=dtype, width=width, neurons=neurons, **kernel)
      for kernel, (width, neurons), dtype in product(KERNELS, SHAPES, ("bfloat16", "float16", "float32"))),
    *(Case(dtype="float32", width=768, neurons=3072, tf32=True, **kernel) for kernel in KERNELS[1:4]),
]  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """What a binary uses, with the instructions of NVIDIA's binaries. AMD's are not counted.

    Attributes:
        registers: Registers of a thread.
        spilled: Bytes of a thread's stack. Spilled registers lie there.
        shared: Bytes of a program's shared memory.
        programs: Programs that a multiprocessor holds at once.
        loop: Instructions of one step of the product's loop; 0 without a product.
        rest: Instructions after that loop, or all instructions without a product.
        barriers: Barriers among `rest`.
    """

    registers: int
    spilled: int
    shared: int
    programs: int
    loop: int = 0
    rest: int = 0
    barriers: int = 0


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an empty tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_of(case: Case, target: str = "sm_90") -> Launch:
    """Return the launch of a case for 8 examples of 500 tokens, with the first candidate of the tuning, as a device has it."""
    module = import_module(f"secateur_kernels.{case.operation}.triton")
    dtype = getattr(torch, case.dtype)
    shapes = (8, 500, case.width), (8, 500, case.neurons), (case.width, case.neurons)
    g, h, weight = (meta(*shape, dtype=dtype) for shape in shapes)
    mask, vector, nodes = meta(8, 500, dtype=torch.bool), meta(case.width), meta(6, 8)

    def interpolated_norm() -> None:
        _, normed, statistics = module.launch(g, g, vector, nodes, vector, vector, 1e-5, "layer_norm")
        needed = (not case.zeros, not case.zeros, case.zeros, False)  # At r, u and zeros; and whether the first is in float32.
        module.launch_backward(normed, normed, g, g, vector, nodes, vector, statistics, "layer_norm", *needed)

    functions: dict[str, Callable[[], Any]] = {
        "product_sum": lambda: module.launch(h, h, mask),
        "neuron_attribution": lambda: module.launch(h, g, weight, mask, "sum", case.tf32),
        "interpolated_norm": interpolated_norm,
        "scored_mlp_backward": lambda: module.launch(
            g, weight, h, h if case.activation in GATED else None, mask, case.activation, "abs_sum", case.tf32
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur_kernels.tiles.device_of", lambda _: TARGETS[target].device)
        recorded = launches(module, functions[case.operation])
    return next(candidates(recorded[-1] if case.backward else recorded[0]))


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


def binary(launch: Launch, target: str) -> Any:
    """Compile the launch for a target, with the alignment that Triton assumes for these arguments."""
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
    gpu = TARGETS[target]
    return triton.compile(
        source, target=GPUTarget("hip" if gpu.device.amd else "cuda", gpu.arch, gpu.warp), options=launch.options
    )


def usage(launch: Launch, target: str) -> Usage:
    """Compile the launch for a target and count what the binary uses."""
    compiled = binary(launch, target)
    gpu = TARGETS[target]
    threads = compiled.metadata.num_warps * gpu.warp
    shared = compiled.metadata.shared
    if gpu.device.amd:
        found = dict(re.findall(r"\.(vgpr_count|agpr_count|private_segment_fixed_size): +(\d+)", compiled.asm["amdgcn"]))
        registers, spilled = int(found["vgpr_count"]), int(found["private_segment_fixed_size"])
        return Usage(registers, spilled, shared, _programs(gpu, registers, 8, shared, threads))
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", compiled)))
    registers, spilled = int(resources["REG"]), int(resources["STACK"]) + int(resources["LOCAL"])
    # CUDA takes 1 KiB of shared memory for each program.
    programs = _programs(gpu, registers, 8, shared + 1024, threads)
    return Usage(registers, spilled, shared, programs, *_instructions(_tool("nvdisasm", "-c", compiled)))


def _programs(gpu: Target, registers: int, unit: int, shared: int, threads: int) -> int:
    """Return how many programs a multiprocessor holds. Registers of a thread are given out in units."""
    taken = -(-registers // unit) * unit * threads
    return min(gpu.registers // taken, gpu.shared // max(shared, 1), gpu.threads // threads)


def _tool(name: str, option: str, compiled: Any) -> str:
    """Return what one of the tools that Triton ships says about a compiled kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        command = [getattr(knobs.nvidia, name).path, option, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


MATRIX = re.compile(r"\b(HGMMA|HMMA|IMMA|QGMMA|UTC[A-Z]*MMA)\b")  # The matrix units of each generation.


def _instructions(text: str) -> tuple[int, int, int]:
    """Return the instructions of a product's loop, those after it, and the barriers among the latter.

    The loop is the shortest one with an instruction of the matrix units, or without those the shortest with more than 64 fused
    products and sums.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
    while instructions[-1] == "NOP":
        instructions.pop()
    jumps = [(re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction), end) for end, instruction in enumerate(instructions)]
    loops = [(labels[jump[1]], end) for jump, end in jumps if jump and labels[jump[1]] < end]

    def with_products(products: re.Pattern[str], least: int) -> list[tuple[int, int]]:
        return [(a, b) for a, b in loops if sum(bool(products.search(x)) for x in instructions[a : b + 1]) >= least]

    found = with_products(MATRIX, 1) or with_products(re.compile(r"\bFFMA2?\b"), 65)
    first, last = min(found, key=lambda loop: loop[1] - loop[0]) if found else (0, -1)
    rest = instructions[last + 1 :]
    return last + 1 - first, len(rest), sum("BAR." in instruction for instruction in rest)
