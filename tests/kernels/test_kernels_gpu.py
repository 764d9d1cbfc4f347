"""The kernels on a CUDA device: sizes that the interpreter is too slow for, and tuning that must not change results."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur_kernels import interpolated_norm, neuron_attribution, product_sum, scored_mlp_backward
from secateur_kernels.backend import INTERPRETED

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="not under the interpreter")]

OPERATIONS = ["product_sum", "neuron_attribution", "interpolated_norm", "scored_mlp_backward"]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return random numbers on the device."""
    return torch.randn(shape, device="cuda", dtype=dtype)


def call(operation: str, dtype: torch.dtype, width: int, neurons: int) -> Callable[..., Any]:
    """Return a function that takes a backend and returns tensors."""
    shapes = (3, 700, width), (3, 700, neurons), (3, 700, neurons), (width, neurons)
    g, h, up, weight = (random(*shape, dtype=dtype) for shape in shapes)
    mask, vector, nodes = torch.rand(3, 700, device="cuda") > 0.3, random(width), torch.rand(4, device="cuda")
    weight /= width**0.5

    def interpolated(backend: Any) -> list[Tensor]:
        r, u = g.clone().requires_grad_(), g.flip(0).requires_grad_()
        outputs = interpolated_norm(r, u, vector, nodes, vector, vector, 1e-5, "layer_norm", backend=backend)
        return [*outputs, *torch.autograd.grad(outputs, (r, u), (outputs[1].detach(), outputs[0].detach()))]

    calls: dict[str, Callable[..., Any]] = {
        "product_sum": lambda backend: [product_sum(h, up, mask, backend=backend)],
        "neuron_attribution": lambda backend: [neuron_attribution(h, g, weight, mask, backend=backend)],
        "scored_mlp_backward": lambda backend: scored_mlp_backward(g, weight, h, up, mask, activation="gelu", backend=backend),
        "interpolated_norm": interpolated,
    }
    return calls[operation]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Check the relative error in the Frobenius norm."""
    limit = 2e-5 if actual.dtype == torch.float32 else 2 * torch.finfo(actual.dtype).eps
    assert float((actual.double() - expected.double()).norm()) <= limit * float(expected.double().norm())


@pytest.mark.parametrize("shape", [(768, 3072), (2048, 5632), (123, 457)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_equals_the_reference_twice_the_same(operation: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    function = call(operation, dtype, *shape)
    first, second, reference = function("triton"), function("triton"), function("reference")
    for output, repeated, expected in zip(first, second, reference, strict=True):
        assert torch.equal(output, repeated)
        assert_near(output, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_tuning_chooses_changes_no_bit(monkeypatch: pytest.MonkeyPatch, operation: str, dtype: torch.dtype) -> None:
    module = import_module(f"secateur_kernels.{operation}.triton")
    (tuner,) = (value for value in vars(module).values() if hasattr(value, "configs"))
    function = call(operation, dtype, 2048, 5632)
    outputs = []
    for config in list(tuner.configs):
        monkeypatch.setattr(tuner, "configs", [config])
        outputs.append(function("triton"))
    assert len(outputs) > 1
    assert all(torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_is_triton(operation: str) -> None:
    function = call(operation, torch.bfloat16, 768, 3072)
    assert all(torch.equal(a, b) for a, b in zip(function("auto"), function("triton"), strict=True))


def test_more_elements_than_an_int32_counts() -> None:
    """The last example lies beyond 2^31 elements. Its results equal those of a call with it alone."""
    h, g, weight = random(3, 2**18, 3072), random(3, 2**18, 32), random(32, 3072)
    assert h.numel() > 2**31
    assert_near(product_sum(h, h)[-1:], product_sum(h[-1:], h[-1:]))
    assert_near(neuron_attribution(h, g, weight)[-1:], neuron_attribution(h[-1:], g[-1:], weight))
    dpre, _, scores = scored_mlp_backward(g, weight, h, activation="relu")
    last, _, alone = scored_mlp_backward(g[-1:], weight, h[-1:], activation="relu")
    assert torch.equal(dpre[-1:], last)
    assert_near(scores[-1:], alone)


def test_more_residuals_than_an_int32_counts() -> None:
    r, u, nodes = random(2, 2**17, 1024), random(2, 2**17, 1024), torch.rand(9, device="cuda")
    residuals, normed = interpolated_norm(r, u, None, nodes, None, None, 1e-6, "rms_norm")
    assert residuals.numel() > 2**31
    alone = interpolated_norm(r[-1:, -8:], u[-1:, -8:], None, nodes[-1:], None, None, 1e-6, "rms_norm")
    assert torch.equal(residuals[-1:, -1:, -8:], alone[0])
    assert torch.equal(normed[-1:, -1:, -8:], alone[1])


def test_compiled_by_inductor() -> None:
    h, g, weight = random(2, 300, 512), random(2, 300, 256), random(256, 512)
    compiled = torch.compile(lambda *x: neuron_attribution(*x) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(h, g, weight), neuron_attribution(h, g, weight) * 2)
