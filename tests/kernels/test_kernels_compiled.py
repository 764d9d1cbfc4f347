"""Each kernel is compiled ahead of time for three generations of GPUs.

It must compile, spill no register, and fit in shared memory.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES
from torch import Tensor

from secateur_kernels.backend import INSTALLED, INTERPRETED

if not INSTALLED or INTERPRETED:
    pytest.skip("needs triton without its interpreter", allow_module_level=True)

from compiled import SHARED, Launch, candidates, launches, usage


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an empty tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(operation: str, dtype: torch.dtype, width: int, neurons: int, activation: str = "gelu_new") -> list[Launch]:
    """Return the launches of an operation for 8 examples of 500 tokens. The MLP is gated with gelu_new, otherwise plain."""
    module = import_module(f"secateur_kernels.{operation}.triton")
    g, h, weight = (meta(*shape, dtype=dtype) for shape in ((8, 500, width), (8, 500, neurons), (width, neurons)))
    mask, vector, nodes = meta(8, 500, dtype=torch.bool), meta(width), meta(6, 8)

    def interpolated_norm() -> None:
        _, normed, statistics = module.launch(g, g, vector, nodes, vector, vector, 1e-5, "layer_norm")
        module.launch_backward(normed, normed, g, g, vector, nodes, vector, statistics, "layer_norm", True, True, False)

    def scored_mlp_backward() -> None:
        up = h if activation == "gelu_new" else None
        module.launch(g, weight, h, up, mask, activation, "abs_sum", False)

    functions: dict[str, Any] = {
        "product_sum": lambda: module.launch(h, h, mask),
        "neuron_attribution": lambda: module.launch(h, g, weight, mask, "sum", False),
        "interpolated_norm": interpolated_norm,
        "scored_mlp_backward": scored_mlp_backward,
    }
    operation_launches = launches(module, functions[operation])
    assert len(operation_launches) == (2 if operation == "interpolated_norm" else 1)
    return operation_launches


OPERATIONS = ["product_sum", "neuron_attribution", "interpolated_norm", "scored_mlp_backward"]


def check(launch: Launch, capability: int, spilled: int = 0) -> None:
    """Check the local and the shared memory of a compiled launch."""
    used = usage(launch, capability)
    assert used.local <= spilled, (launch.options, used)
    assert used.shared <= SHARED[capability], (launch.options, used)


@pytest.mark.parametrize("capability", SHARED, ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_dtype_and_target(operation: str, dtype: torch.dtype, capability: int) -> None:
    for launch in calls(operation, dtype, 768, 3072):
        check(next(candidates(launch)), capability)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_candidate_of_the_tuning(operation: str) -> None:
    for launch in calls(operation, torch.bfloat16, 768, 3072):
        for candidate in candidates(launch):
            check(candidate, 90)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_odd_widths(operation: str) -> None:
    for launch in calls(operation, torch.bfloat16, 123, 457):
        check(next(candidates(launch)), 90)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_large_widths(operation: str) -> None:
    """The gated MLP's large tile uses all registers. The spilled values are used once, after the product."""
    for launch in calls(operation, torch.bfloat16, 4096, 14336):
        check(next(candidates(launch)), 90, spilled=32 if operation == "scored_mlp_backward" else 0)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations(activation: str) -> None:
    for launch in calls("scored_mlp_backward", torch.bfloat16, 768, 3072, activation):
        check(next(candidates(launch)), 90)


def test_sizes_of_one() -> None:
    """Triton turns arguments that are 1 into constants, which have no methods. Speed is not tested at these sizes."""
    for operation in OPERATIONS:
        for launch in calls(operation, torch.float32, 1, 1):
            ones = dict.fromkeys(("rows", "tokens", "count"), 1)
            arguments = {name: ones.get(name, value) for name, value in launch.arguments.items()}
            check(next(candidates(Launch(launch.kernel, arguments, launch.options))), 90, spilled=32)


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")])
@pytest.mark.parametrize("operation", ["neuron_attribution", "scored_mlp_backward"])
def test_half_precision_runs_on_the_matrix_units(operation: str, capability: int, instruction: str) -> None:
    (launch,) = calls(operation, torch.bfloat16, 768, 3072)
    ptx = usage(next(candidates(launch)), capability).ptx
    assert instruction in ptx
    # Tiles are loaded 16 bytes at a time and bypass the registers.
    assert "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize("operation", ["neuron_attribution", "scored_mlp_backward"])
def test_float32_is_not_rounded_to_tf32(operation: str) -> None:
    (launch,) = calls(operation, torch.float32, 768, 3072)
    ptx = usage(next(candidates(launch)), 90).ptx
    assert "tf32" not in ptx
    assert "fma.rn.f32" in ptx


def test_programs_that_share_a_multiprocessor() -> None:
    """neuron_attribution at T5's width relies on two programs per multiprocessor.

    A multiprocessor has 65,536 registers and 227 KiB of shared memory. A program has 256 threads.
    """
    (launch,) = calls("neuron_attribution", torch.bfloat16, 768, 3072)
    used = usage(next(candidates(launch)), 90)
    assert used.registers <= 128
    assert 2 * used.shared <= SHARED[90]
