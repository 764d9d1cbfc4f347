"""Each kernel is compiled ahead of time for four architectures, and what the binary uses is compared with committed counts.

`tests/support/compiled_counts.py` writes the counts. A change that needs more registers, memory or instructions than they say
fails here; write them again if it is worth it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur_kernels.backend import INSTALLED, INTERPRETED

if not INSTALLED or INTERPRETED:
    pytest.skip("needs triton without its interpreter", allow_module_level=True)

import triton
from compiled import CASES, TARGETS, Case, Launch, binary, candidates, launch_of, launches, meta, usage
from compiled_counts import committed, expected, pairs, tables

OPERATIONS = ["product_sum", "neuron_attribution", "interpolated_norm", "scored_mlp_backward"]
PRODUCTS = ["neuron_attribution", "scored_mlp_backward"]


def case_of(operation: str, dtype: str = "bfloat16", width: int = 768, neurons: int = 3072, **more: Any) -> Case:
    """Return a case. `scored_mlp_backward` is gated with gelu_new."""
    activation = "gelu_new" if operation == "scored_mlp_backward" else ""
    return Case(operation, dtype, width, neurons, activation, **more)


def in_the_default_run(target: str, case: Case) -> bool:
    """Return whether CI compiles a case: bfloat16, on compute capability 9 at both shapes, and float32 there at the smaller."""
    if target == "sm_90":
        return case.dtype == "bfloat16" or (case.dtype == "float32" and case.width == 768)
    products_of_two = case.operation in PRODUCTS and case.activation in ("", "gelu_new") and case.dtype == "bfloat16"
    return (products_of_two and target != "sm_75") or (target == "sm_75" and case.operation == "neuron_attribution")


@pytest.mark.parametrize(
    ("target", "case"),
    [
        pytest.param(target, case, id=f"{target}-{case}", marks=[] if in_the_default_run(target, case) else pytest.mark.slow)
        for target, case in pairs()
    ],
)
def test_a_kernel_uses_no_more_than_its_committed_counts(target: str, case: Case) -> None:
    """Counts of another version of Triton cannot be compared. Then a kernel must fit in the device's shared memory."""
    used = usage(launch_of(case, target), target)
    assert used.shared <= TARGETS[target].device.shared
    if triton.__version__ != committed()["triton"]:
        pytest.skip(f"counted with triton {committed()['triton']}, this is {triton.__version__}")
    bound = expected(target, case)
    assert used.programs >= bound.programs, (used, bound)
    assert all(
        getattr(used, name) <= getattr(bound, name) for name in ("registers", "spilled", "shared", "loop", "rest", "barriers")
    ), (used, bound)


def test_the_committed_counts_keep_what_the_kernels_rely_on() -> None:
    """The product of half precision at BERT's width shares a multiprocessor, nothing large is spilled, all fits in memory."""
    for target, case in pairs():
        used = expected(target, case)
        assert used.shared <= TARGETS[target].device.shared
        assert used.spilled <= 32, (target, case, used)
        if target in ("sm_90", "sm_100") and case.dtype != "float32" and case.width == 768:
            assert used.programs >= 2, (target, case, used)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_candidate_of_the_tuning_fits(operation: str) -> None:
    for candidate in candidates(launch_of(case_of(operation, backward=operation == "interpolated_norm"))):
        used = usage(candidate, "sm_90")
        assert used.spilled <= 8
        assert used.shared <= TARGETS["sm_90"].device.shared


@pytest.mark.parametrize("operation", OPERATIONS)
def test_odd_widths(operation: str) -> None:
    used = usage(launch_of(case_of(operation, width=123, neurons=457)), "sm_90")
    assert used.spilled == 0
    assert used.shared <= TARGETS["sm_90"].device.shared


def test_short_examples() -> None:
    """neuron_attribution has a sum of its own for examples of at most a quarter of a tile. Its binary still shares."""
    launch = launch_of(case_of("neuron_attribution"))
    used = usage(Launch(launch.kernel, {**launch.arguments, "SHORT": True}, launch.options), "sm_90")
    assert (used.programs, used.barriers) == (2, 50)
    assert used.spilled <= 24
    assert used.rest <= 1446


def test_sizes_of_one() -> None:
    """Triton turns arguments that are 1 into constants, which have no methods. Speed is not tested at these sizes."""
    for operation in OPERATIONS:
        launch = launch_of(case_of(operation, "float32", 1, 1))
        ones = dict.fromkeys(("rows", "tokens", "count"), 1)
        arguments = {name: ones.get(name, value) for name, value in launch.arguments.items()}
        assert usage(Launch(launch.kernel, arguments, launch.options), "sm_90").spilled <= 32


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")],
)
@pytest.mark.parametrize("operation", PRODUCTS)
def test_half_precision_runs_on_the_matrix_units(operation: str, target: str, instruction: str) -> None:
    compiled = binary(launch_of(case_of(operation), target), target)
    assembly = compiled.asm["amdgcn" if target == "gfx942" else "ptx"]
    assert instruction in assembly
    if target != "gfx942":  # Tiles are loaded 16 bytes at a time and bypass the registers.
        assert "cp.async.cg.shared.global" in assembly


@pytest.mark.parametrize("operation", PRODUCTS)
def test_float32_is_rounded_to_tf32_only_where_it_is_allowed(operation: str) -> None:
    exact, rounded = (binary(launch_of(case_of(operation, "float32", tf32=tf32)), "sm_90").asm["ptx"] for tf32 in (False, True))
    assert "tf32" not in exact
    assert "fma.rn.f32" in exact
    assert "tf32" in rounded


def test_all_cases_are_counted() -> None:
    counts = committed()["counts"]
    assert {(target, name) for target in counts for name in counts[target]} == {(target, str(case)) for target, case in pairs()}
    assert len(set(map(str, CASES))) == len(CASES)


def test_the_page_of_benchmarks_has_the_committed_counts() -> None:
    page = (Path(__file__).parents[2] / "bench" / "README.md").read_text(encoding="utf-8")
    for table in tables().split("\n\n"):
        assert table in page, "python tests/support/compiled_counts.py --tables"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_second_step_of_the_scored_backward_spills_nothing(target: str, gated: bool) -> None:
    """It is bound by memory: many programs must share a multiprocessor."""
    module = import_module("secateur_kernels.scored_mlp_backward.two_steps")
    g, pre, weight = (meta(*shape, dtype=torch.bfloat16) for shape in ((8, 500, 768), (8, 500, 3072), (768, 3072)))
    activation = "gelu_new" if gated else "gelu"
    mask = meta(8, 500, dtype=torch.bool)
    (launch,) = launches(
        module, lambda: module.launch_two_steps(g, weight, pre, pre if gated else None, mask, activation, "sum")
    )
    used = usage(launch, target)
    assert used.spilled == 0, used
    if target != "gfx942":
        assert used.programs >= 4, used
