"""The kernels under torch.compile and torch.export, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, device
from torch import Tensor, nn

from secateur_kernels import backend as backend_module
from secateur_kernels import interpolated_norm, neuron_attribution, product_sum, scored_mlp_backward
from secateur_kernels.backend import Backend, uses_triton


def call(operation: str, backend: Backend) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Return a function that takes only tensors, and its tensors."""
    where = device(backend)
    g, h, weight = torch.randn(2, 5, 6, device=where), torch.randn(2, 5, 7, device=where), torch.randn(6, 7, device=where)
    mask, nodes, vector = torch.ones(2, 5, device=where), torch.rand(3, device=where), torch.randn(6, device=where)
    calls: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "product_sum": (lambda x, dx, m: product_sum(x, dx, m, backend=backend), (h, h + 1, mask)),
        "neuron_attribution": (
            lambda h, g, w, m: neuron_attribution(h, g, w, m, "abs_sum", backend=backend),
            (h, g, weight, mask),
        ),
        "interpolated_norm": (
            lambda r, u, n, v: interpolated_norm(r, u, None, n, v, None, 1e-6, "rms_norm", backend=backend),
            (g, g + 1, nodes, vector),
        ),
        "scored_mlp_backward": (
            lambda *x: scored_mlp_backward(*x, activation="silu", backend=backend),
            (g, weight, h, h + 1, mask),
        ),
    }
    return calls[operation]


OPERATIONS = ["product_sum", "neuron_attribution", "interpolated_norm", "scored_mlp_backward"]


class Module(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compile_in_one_graph(operation: str, backend: Backend) -> None:
    function, tensors = call(operation, backend)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors), function(*tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_export(operation: str, backend: Backend) -> None:
    function, tensors = call(operation, backend)
    exported = torch.export.export(Module(function), tensors)
    if backend == "triton":
        assert f"secateur.{operation}" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*tensors), function(*tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_a_compiled_graph(backend: Backend) -> None:
    function, (r, u, nodes, vector) = call("interpolated_norm", backend)
    leaves = r.requires_grad_(), u.requires_grad_()

    def value(r: Tensor, u: Tensor) -> Tensor:
        residuals, normed = function(r, u, nodes, vector)
        total: Tensor = (residuals * normed).sum()
        return total

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(value(*leaves), leaves))


@pytest.mark.skipif("triton" not in BACKENDS, reason="runs under Triton's interpreter")
def test_the_operators_keep_torch_library_s_rules() -> None:
    h, g, weight, mask = torch.randn(2, 5, 7), torch.randn(2, 5, 6), torch.randn(6, 7), torch.ones(2, 5)
    nodes, vector = torch.rand(3), torch.randn(6)
    operators = torch.ops.secateur
    torch.library.opcheck(operators.product_sum.default, (h, h, mask))
    torch.library.opcheck(operators.neuron_attribution.default, (h, g, weight, mask, "sum", False))
    torch.library.opcheck(operators.scored_mlp_backward.default, (g, weight, h, h + 1, mask, "gelu", "sum", False))
    leaves = g.clone().requires_grad_(), g.clone().requires_grad_(), vector.clone().requires_grad_()
    torch.library.opcheck(operators.interpolated_norm.default, (*leaves, nodes, vector, None, 1e-5, "layer_norm", None))
    zeros = torch.zeros(3, *g.shape, requires_grad=True)
    torch.library.opcheck(operators.interpolated_norm.default, (*leaves, nodes, vector, None, 1e-5, "layer_norm", zeros))


def test_auto_is_the_reference_on_the_cpu_and_for_float64() -> None:
    assert not uses_triton("auto", torch.ones(1))
    assert not uses_triton("auto", torch.ones(1, dtype=torch.float64))
    assert not uses_triton("reference", torch.ones(1))


@pytest.mark.parametrize(
    ("installed", "interpreted", "dtype", "message"),
    [
        (False, True, torch.float32, "expected the package triton to be installed for 'triton', found none"),
        (True, True, torch.float64, "expected tensors of float32, float16 or bfloat16 for 'triton', got torch.float64"),
        (True, False, torch.float32, "expected CUDA tensors .or TRITON_INTERPRET=1. for 'triton', got cpu"),
    ],
    ids=["not-installed", "float64", "cpu"],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_forced_backend_never_falls_back(
    monkeypatch: pytest.MonkeyPatch, operation: str, installed: bool, interpreted: bool, dtype: torch.dtype, message: str
) -> None:
    monkeypatch.setattr(backend_module, "INSTALLED", installed)
    monkeypatch.setattr(backend_module, "INTERPRETED", interpreted)
    function, _ = call(operation, "triton")
    with pytest.raises(ValueError, match=f"^backend: {message}"):
        function(*(tensor.cpu().to(dtype) for tensor in call(operation, "reference")[1]))
