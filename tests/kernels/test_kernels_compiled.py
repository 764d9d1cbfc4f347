"""Each kernel compiled ahead of time for three generations of GPUs: it compiles, spills no register, fits in shared memory."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES
from torch import Tensor

from secateur_kernels.backend import FOUND, INTERPRETED

if not FOUND or INTERPRETED:
    pytest.skip("needs triton, and not its interpreter", allow_module_level=True)

from compiled import SHARED, Launch, candidates, launches, usage


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(operation: str, dtype: torch.dtype, width: int, neurons: int, activation: str = "gelu_new") -> list[Launch]:
    """What an operation launches for 8 examples of 500 tokens. activation: the MLP is gated with gelu_new, else plain."""
    module = import_module(f"secateur_kernels.{operation}.triton")
    g, h, weight = (meta(*shape, dtype=dtype) for shape in ((8, 500, width), (8, 500, neurons), (width, neurons)))
    mask, vector, nodes = meta(8, 500, dtype=torch.bool), meta(width), meta(6, 8)

    def interpolated_norm() -> None:
        _, normed, statistics = module.launch(g, g, vector, nodes, vector, vector, 1e-5, "layer_norm")
        module.launch_backward(normed, normed, g, g, vector, nodes, vector, statistics, "layer_norm", True, True, False)

    def scored_mlp_backward() -> None:
        up = h if activation == "gelu_new" else None
        module.launch(g, weight, h, up, mask, activation, "abs_sum", False)

    made: dict[str, Any] = {
        "product_sum": lambda: module.launch(h, h, mask),
        "neuron_attribution": lambda: module.launch(h, g, weight, mask, "sum", False),
        "interpolated_norm": interpolated_norm,
        "scored_mlp_backward": scored_mlp_backward,
    }
    found = launches(module, made[operation])
    assert len(found) == (2 if operation == "interpolated_norm" else 1)
    return found


OPERATIONS = ["product_sum", "neuron_attribution", "interpolated_norm", "scored_mlp_backward"]


def check(launch: Launch, capability: int, spilled: int = 0) -> None:
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
    """The gated MLP's large tile has registers to the brim: what it spills is used once, after the product."""
    for launch in calls(operation, torch.bfloat16, 4096, 14336):
        check(next(candidates(launch)), 90, spilled=32 if operation == "scored_mlp_backward" else 0)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations(activation: str) -> None:
    for launch in calls("scored_mlp_backward", torch.bfloat16, 768, 3072, activation):
        check(next(candidates(launch)), 90)


def test_sizes_of_one() -> None:
    """Triton makes constants of arguments that are 1: they have no methods. No size for speed."""
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
    # Tiles come by 16 bytes at a time, past the registers.
    assert "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize("operation", ["neuron_attribution", "scored_mlp_backward"])
def test_float32_is_not_rounded_to_tf32(operation: str) -> None:
    (launch,) = calls(operation, torch.float32, 768, 3072)
    ptx = usage(next(candidates(launch)), 90).ptx
    assert "tf32" not in ptx
    assert "fma.rn.f32" in ptx


def test_programs_that_share_a_multiprocessor() -> None:
    """neuron_attribution at T5's width counts on two programs: 65,536 registers, 227 KiB, 256 threads each."""
    (launch,) = calls("neuron_attribution", torch.bfloat16, 768, 3072)
    used = usage(next(candidates(launch)), 90)
    assert used.registers <= 128
    assert 2 * used.shared <= SHARED[90]
