"""interpolated_norm and its gradients compared with loops and autograd in float64: norms, nodes, shapes, dtypes, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from kernel_cases import BACKENDS, DTYPES, assert_exact, device, poisoned
from torch import Tensor

from secateur_kernels import interpolated_norm
from secateur_kernels.backend import Backend, Norm

EPS = 1e-5
norm: Callable[..., tuple[Tensor, Tensor]] = interpolated_norm  # The tests call it with lists of tensors.
SHAPES = [(1, 1, 1, 1), (3, 2, 9, 60), (2, 3, 5, 123), (4, 1, 2, 1030), (2, 0, 3, 4), (2, 3, 0, 4), (0, 2, 3, 4)]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, full: bool, where: str) -> list[Any]:
    """Return r, u, bias, nodes, norm_weight and norm_bias.

    With `full`, all vectors are present and each example has its own nodes.
    """
    count, batch, tokens, width = shape
    r, u = (torch.randn(batch, tokens, width).to(where, dtype).requires_grad_() for _ in range(2))
    vectors: list[Any] = [torch.randn(width).to(where) if full else None for _ in range(3)]
    if full:
        vectors[0] = vectors[0].requires_grad_()
    nodes = torch.rand((count, batch) if full else (count,)).to(where)
    return [r, u, vectors[0], nodes, *vectors[1:]]


def loop(values: list[Any], kind: Norm) -> tuple[Tensor, Tensor]:
    """Compute the formula token by token. The result is differentiable."""
    r, u, bias, nodes, norm_weight, norm_bias = values
    residuals, normed = [], []
    for k in range(nodes.shape[0]):
        for b in range(r.shape[0]):
            for t in range(r.shape[1]):
                x = r[b, t] + (nodes[k, b] if nodes.dim() == 2 else nodes[k]) * u[b, t]
                x = x if bias is None else x + bias
                residuals.append(x)
                x = x - x.mean() if kind == "layer_norm" else x
                x = x / torch.sqrt((x * x).mean() + EPS)
                x = x if norm_weight is None else x * norm_weight
                normed.append(x if norm_bias is None else x + norm_bias)
    shape = (nodes.shape[0], *r.shape)
    return (torch.stack(residuals).view(shape), torch.stack(normed).view(shape)) if residuals else (r.new_zeros(shape),) * 2


def converted(values: list[Any], dtype: torch.dtype) -> list[Any]:
    """Return CPU copies in this dtype."""
    return [None if x is None else x.detach().cpu().to(dtype).requires_grad_(x.requires_grad) for x in values]


def gradients(outputs: tuple[Tensor, Tensor], values: list[Any], cotangents: list[Tensor]) -> list[Tensor]:
    """Return the gradients at the inputs that require one."""
    leaves = [x for x in values if x is not None and x.requires_grad]
    return list(torch.autograd.grad(outputs, leaves, [c.to(outputs[0]) for c in cotangents]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", get_args(Norm))
@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_loop(shape: tuple[int, int, int, int], dtype: torch.dtype, full: bool, kind: Norm, backend: Backend) -> None:
    values = inputs(shape, dtype, full, device(backend))
    cotangents = [torch.randn(shape).to(device(backend), dtype) for _ in range(2)]
    with poisoned():
        outputs = norm(*values, EPS, kind, backend=backend)
        grads = gradients(outputs, values, cotangents) if 0 not in shape else []
    exact_values, eager_values = converted(values, torch.float64), converted(values, torch.float32)
    exact, eager_outputs = loop(exact_values, kind), loop(eager_values, kind)
    assert all(x.dtype == dtype for x in outputs)
    largest = 1 + exact[0].detach().abs().amax(-1, keepdim=True) if 0 not in shape else torch.zeros(shape)
    for output, exact_output, eager_output in zip(outputs, exact, eager_outputs, strict=True):
        # A LayerNorm divides by a deviation that may be much smaller than its input.
        limit = 2 * largest + exact_output.detach().abs()
        assert_exact(output.detach(), exact_output.detach(), eager_output.detach(), limit)
    if not grads:
        return
    cotangents = [c.cpu() for c in cotangents]
    exact_grads, eager_grads = gradients(exact, exact_values, cotangents), gradients(eager_outputs, eager_values, cotangents)
    for grad, exact_grad, eager_grad in zip(grads, exact_grads, eager_grads, strict=True):
        steps = shape[0] if grad.dim() == 3 else shape[0] * shape[1] * shape[2]
        assert_exact(grad, exact_grad, eager_grad, (3 * steps + 3 * exact_grad.abs().max()).expand(exact_grad.shape))


@pytest.mark.parametrize("kind", get_args(Norm))
def test_gradcheck_of_the_reference(kind: Norm) -> None:
    values = [x.detach().requires_grad_() for x in converted(inputs((2, 2, 3, 5), torch.float64, True, "cpu"), torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: norm(*x, EPS, kind), values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1], ids=["residuals", "normed"])
def test_one_output_and_one_input(used: int, backend: Backend) -> None:
    values = inputs((3, 2, 4, 10), torch.float32, True, device(backend))
    values[1] = values[1].detach()
    values[2] = values[2].detach()
    exact_values = converted(values, torch.float64)
    cotangent = torch.randn(3, 2, 4, 10)
    output = norm(*values, EPS, "layer_norm", backend=backend)[used]
    exact = loop(exact_values, "layer_norm")[used]
    (grad,) = torch.autograd.grad(output, values[0], cotangent.to(output))
    (exact_grad,) = torch.autograd.grad(exact, exact_values[0], cotangent.double())
    torch.testing.assert_close(grad.cpu().double(), exact_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_two_runs_and_inputs_unwritten(backend: Backend) -> None:
    where = device(backend)
    r = torch.randn(9, 3, 10, device=where).transpose(0, 1)
    u = torch.randn(3, 9, 20, device=where)[..., ::2]
    values: list[Any] = [r, u, torch.randn(20, device=where)[::2], torch.rand(3, 4, device=where).T, None, None]
    copies: list[Any] = [None if x is None else x.clone() for x in values]
    outputs = norm(*values, EPS, "rms_norm", backend=backend)
    for output, exact_output in zip(outputs, loop(converted(values, torch.float64), "rms_norm"), strict=True):
        torch.testing.assert_close(output.cpu().double(), exact_output, rtol=1e-4, atol=1e-5)
    again = norm(*values, EPS, "rms_norm", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert all(x is None or torch.equal(x, before) for x, before in zip(values, copies, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean(backend: Backend) -> None:
    """The variance is computed from the centred residual, not as a difference of large numbers."""
    values = inputs((2, 2, 3, 64), torch.float32, False, device(backend))
    values[0] = values[0].detach() + 1000
    normed = norm(*values, EPS, "layer_norm", backend=backend)[1].detach()
    exact = loop(converted(values, torch.float64), "layer_norm")[1].detach()
    torch.testing.assert_close(normed.cpu().double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", get_args(Norm))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_get_the_gradient_at_each_residual(dtype: torch.dtype, kind: Norm, backend: Backend) -> None:
    """One expanded number stands for the zeros. The other gradients stay as they are without zeros."""
    shape = (3, 2, 9, 60)
    values = inputs(shape, dtype, True, device(backend))
    zeros = values[0].detach().new_zeros(()).expand(shape).requires_grad_()
    cotangents = [torch.randn(shape).to(device(backend), dtype) for _ in range(2)]
    usual = gradients(norm(*values, EPS, kind, backend=backend), values, cotangents)
    with poisoned():
        outputs = norm(*values, EPS, kind, zeros=zeros, backend=backend)
        *others, grad = gradients(outputs, [*values, zeros], cotangents)
    assert grad.dtype == dtype
    assert all(torch.equal(other, before) for other, before in zip(others, usual, strict=True))
    exact_grads = []
    for wide in (torch.float64, torch.float32):
        loop_values = converted(values, wide)
        moved = loop(loop_values, kind)[0].detach().flatten(0, 1).requires_grad_()  # [K * B, T, D]
        of_residuals, of_normed = (c.cpu().to(wide) for c in cotangents)
        normed = loop([moved, torch.zeros_like(moved), None, torch.zeros(1), *loop_values[4:]], kind)[1]
        exact_grads.append(of_residuals + torch.autograd.grad(normed.view(shape), moved, of_normed)[0].view(shape))
    exact, eager = exact_grads
    assert_exact(grad, exact, eager, (3 + 3 * exact.abs().max()).expand(shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_of_another_shape_are_refused(backend: Backend) -> None:
    values = inputs((3, 2, 4, 10), torch.float32, False, device(backend))
    with pytest.raises(ValueError, match=r"zeros: expected shape \(3, 2, 4, 10\), got \(2, 4, 10\)"):
        norm(*values, EPS, "rms_norm", zeros=torch.zeros(2, 4, 10), backend=backend)


X, V, N = torch.ones(2, 3, 4), torch.ones(4), torch.ones(5)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(3, 4), r"^r: expected \[B, T, D\], got shape \(3, 4\)"),
        (1, torch.ones(2, 3, 5), r"^u: expected shape \(2, 3, 4\), got \(2, 3, 5\)"),
        (1, X.half(), r"^r, u: expected one floating dtype"),
        (2, torch.ones(5), r"^bias: expected shape \(4,\), got \(5,\)"),
        (3, torch.ones(5, 3), r"^nodes: expected shape \[K\] or \[K, 2\], got \(5, 3\)"),
        (3, torch.ones(5).long(), r"^nodes: expected one floating dtype, got torch.int64"),
        (4, torch.ones(4, 1), r"^norm_weight: expected shape \(4,\), got \(4, 1\)"),
        (5, torch.ones(4, device="meta"), r"^r, nodes, bias, norm_weight, norm_bias: expected one device"),
        (7, "group_norm", r"^kind: expected one of 'rms_norm', 'layer_norm', got 'group_norm'"),
    ],
    ids=["r", "u", "u-dtype", "bias", "nodes", "nodes-dtype", "norm_weight", "device", "kind"],
)
def test_arguments_that_do_not_fit(position: int, value: Any, message: str) -> None:
    arguments: list[Any] = [X, X, V, N, V, V, EPS, "rms_norm"]
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        norm(*arguments)


@pytest.mark.skipif("triton" not in BACKENDS, reason="runs under Triton's interpreter")
@pytest.mark.parametrize(("position", "name"), [(3, "nodes"), (4, "norm_weight"), (5, "norm_bias")])
def test_gradients_that_the_kernel_lacks(position: int, name: str) -> None:
    arguments: list[Any] = [X, X, V, N, V, V, EPS, "rms_norm"]
    arguments[position] = arguments[position].clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name}: expected requires_grad=False with Triton"):
        norm(*arguments, backend="triton")
    with torch.no_grad():
        norm(*arguments, backend="triton")
