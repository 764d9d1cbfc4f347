"""scored_mlp_backward compared with autograd in float64: activations, gated and plain, shapes, masks, dtypes, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from kernel_cases import BACKENDS, DTYPES, MASKS, TOKENS, assert_exact, device, poisoned, random_mask
from torch import Tensor

from secateur_kernels import scored_mlp_backward
from secateur_kernels.backend import Activation, Backend, Reduction

# The activations are written out and are not PyTorch's. They define the correct results.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
WIDTHS = [(1, 1), (60, 123), (20, 131), (0, 3), (4, 0)]


def exact(
    g: Tensor, weight: Tensor, pre: Tensor, up: Tensor | None, mask: Tensor | None, activation: str, reduction: Reduction
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute gradients and scores by autograd through the MLP, with a gate on each neuron of each token."""
    g, weight, pre = (tensor.cpu().double() for tensor in (g, weight, pre))
    ones = torch.ones_like(pre).requires_grad_()
    leaves = [pre.requires_grad_(), ones]
    h = FUNCTIONS[activation](pre)
    if up is not None:
        leaves.append(up.cpu().double().requires_grad_())
        h = h * leaves[2]
    dpre, scores, *rest = torch.autograd.grad((((h * ones) @ weight.T) * g).sum(), leaves)
    scores = {"sum": scores, "abs_sum": scores.abs(), "square_sum": scores.square()}[reduction]
    return dpre, (rest[0] if rest else None), (scores * (1 if mask is None else mask.cpu().unsqueeze(-1))).sum(1)


def check(
    tokens: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    activation: Activation,
    gated: bool,
    backend: Backend,
    masked: torch.dtype | None = torch.bool,
    reduction: Reduction = "sum",
) -> None:
    """Compare one case with autograd."""
    where, (width, neurons) = device(backend), widths
    g, weight = torch.randn(*tokens, width).to(where, dtype), torch.randn(width, neurons).to(where, dtype)
    pre = (2 * torch.randn(*tokens, neurons)).to(where, dtype)
    up = torch.randn(*tokens, neurons).to(where, dtype) if gated else None
    mask = random_mask(tokens, masked, where)
    options: Any = {"activation": activation, "reduction": reduction}
    with poisoned():
        outputs: Any = scored_mlp_backward(g, weight, pre, up, mask, **options, backend=backend)
    float32_inputs: list[Any] = [None if x is None else x.cpu().float() for x in (g, weight, pre, up)]
    on_cpu = None if mask is None else mask.cpu()
    eager: Any = scored_mlp_backward(
        float32_inputs[0], float32_inputs[1], float32_inputs[2], float32_inputs[3], on_cpu, **options, backend="reference"
    )
    # Bounds of all products. An activation is at most 1.2 times its input, and its slope is at most 1.2. The slope results from
    # ten roundings, whose errors add up to about the square root of ten.
    dh = 3 * 1.2 * (float32_inputs[0].double().abs() @ float32_inputs[1].double().abs())
    gate: Any = 1 if float32_inputs[3] is None else float32_inputs[3].double().abs()
    value = float32_inputs[2].double().abs()
    terms = dh * value * gate
    sizes = (dh * gate * (1 + value), dh * value, (2 * terms.square() if reduction == "square_sum" else terms).sum(1))
    for output, exact_output, eager_output, size in zip(
        outputs, exact(g, weight, pre, up, mask, **options), eager, sizes, strict=True
    ):
        if exact_output is None:
            assert output is None
            continue
        assert_exact(output, exact_output, eager_output, size)
    assert outputs[0].dtype == dtype
    assert outputs[2].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations(activation: Activation, dtype: torch.dtype, gated: bool, backend: Backend) -> None:
    check((3, 43), (60, 33), dtype, activation, gated, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_shapes(tokens: tuple[int, int], widths: tuple[int, int], gated: bool, backend: Backend) -> None:
    check(tokens, widths, torch.float32, "silu", gated, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", MASKS, ids=str)
@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_reductions_and_masks(reduction: Reduction, masked: torch.dtype | None, backend: Backend) -> None:
    check((7, 20), (6, 9), torch.float32, "relu", True, backend, masked, reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_two_runs_and_inputs_unwritten(backend: Backend) -> None:
    where = device(backend)
    both = torch.randn(3, 9, 20, device=where)  # A fused projection returns this layout.
    tensors = [torch.randn(9, 3, 12, device=where).transpose(0, 1), torch.randn(10, 12, device=where).T, *both.chunk(2, -1)]
    copies = [tensor.clone() for tensor in tensors]
    first: Any = scored_mlp_backward(*tensors, activation="gelu", backend=backend)
    for output, exact_output in zip(
        first, exact(tensors[0], tensors[1], tensors[2], tensors[3], None, "gelu", "sum"), strict=True
    ):
        torch.testing.assert_close(output.cpu().double(), exact_output, rtol=1e-4, atol=1e-5)
    again: Any = scored_mlp_backward(*tensors, activation="gelu", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(now, before) for now, before in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("activation", "error"), [("relu", 0), ("gelu", 6e-7), ("gelu_new", 1e-5), ("silu", 3e-6)])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy says it under the interpreter.
def test_value_and_slope_on_the_whole_line(activation: Activation, error: float, backend: Backend) -> None:
    """The kernel has functions of its own. With a gradient of one, dpre is the slope, and a single token's score the value.

    The slope of gelu_new multiplies the rounding of the logistic function by up to 31, and silu's by up to 12.
    """
    pre = torch.cat([torch.linspace(-12, 12, 4096), torch.tensor([-1e4, -100.0, 0.0, -0.0, 100.0, 1e4])]).reshape(1, 1, -1)
    g, weight = torch.ones(1, 1, 1), torch.ones(1, pre.shape[2])
    slope, _, value = scored_mlp_backward(
        *(tensor.to(device(backend)) for tensor in (g, weight, pre)), activation=activation, backend=backend
    )
    exact_slope, _, exact_value = exact(g, weight, pre, None, None, activation, "sum")
    inside = pre.abs() < 20  # Beyond, the exact formulas overflow.
    assert ((slope.cpu() - exact_slope).abs()[inside] <= error).all()
    assert ((value.cpu() - exact_value).abs()[inside[:, 0]] <= error).all()
    assert slope.flatten()[[-6, -1]].tolist() == [0, 1]
    assert value.flatten()[[-6, -1]].tolist() == [0, 1e4]


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("tokens", "dtype", "activation", "reduction"),
    [
        *((tokens, torch.float32, "silu", "sum") for tokens in TOKENS),
        *(((3, 43), dtype, activation, "sum") for dtype in DTYPES for activation in get_args(Activation)),
        *(((2, 131), torch.float32, "relu", reduction) for reduction in get_args(Reduction)),
    ],
    ids=str,
)
def test_two_steps(
    tokens: tuple[int, int], dtype: torch.dtype, activation: Activation, reduction: Reduction, gated: bool, backend: Backend
) -> None:
    """The second implementation, compared with the exact gradients and scores of its own dh."""
    from secateur_kernels.scored_mlp_backward.two_steps import launch_two_steps

    where = device(backend)
    g, weight = torch.randn(*tokens, 20).to(where, dtype), torch.randn(20, 300).to(where, dtype)
    both = (2 * torch.randn(*tokens, 600)).to(where, dtype)  # A fused projection returns this layout.
    pre, up = both[..., :300], both[..., 300:] if gated else None
    mask = random_mask(tokens, torch.bool, where)
    with poisoned():
        outputs = launch_two_steps(g, weight, pre, up, mask, activation, reduction)
    dh = torch.matmul(g.reshape(-1, 20), weight).view(*tokens, 300)
    dpre, dup, scores = exact(dh, torch.eye(300), pre, up, mask, activation, reduction)
    size = dh.cpu().double().abs() * (1 if up is None else up.cpu().double().abs()) * (1 + pre.cpu().double().abs())
    terms = size.square() if reduction == "square_sum" else size
    gradients = [(outputs[0], dpre, size)] + (
        [] if dup is None else [(outputs[1], dup, (dh.double() * pre.double()).abs().cpu())]
    )
    for output, exact_output, of_output in [*gradients, (outputs[-1], scores, 2 * terms.sum(1))]:
        assert output.shape == exact_output.shape
        info = torch.finfo(output.dtype)
        allowed = (16 * torch.finfo(torch.float32).eps + info.eps) * of_output + info.tiny * info.eps
        assert bool(((output.cpu().double() - exact_output).abs() <= allowed).all())
    again = launch_two_steps(g, weight, pre, up, mask, activation, reduction)
    assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))


GOOD: dict[str, Any] = {"g": torch.ones(2, 3, 5), "weight": torch.ones(5, 4), "pre": torch.ones(2, 3, 4), "activation": "relu"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"g": torch.ones(2, 5)}, r"^g: expected \[B, T, D\], got shape \(2, 5\)"),
        ({"pre": torch.ones(3, 4)}, r"^pre: expected \[B, T, F\], got shape \(3, 4\)"),
        ({"g": torch.ones(2, 4, 5)}, r"^g: expected shape \(2, 3, 5\), got \(2, 4, 5\)"),
        ({"weight": torch.ones(4, 5)}, r"^weight: expected shape \(5, 4\), got \(4, 5\)"),
        ({"up": torch.ones(2, 3, 5)}, r"^up: expected shape \(2, 3, 4\), got \(2, 3, 5\)"),
        ({"mask": torch.ones(2, 4)}, r"^mask: expected shape \(2, 3\), got \(2, 4\)"),
        ({"up": torch.ones(2, 3, 4).half()}, r"^g, weight, pre, up: expected one floating dtype"),
        ({"activation": "tanh"}, r"^activation: expected one of 'relu', 'gelu', 'gelu_new', 'silu', got 'tanh'"),
        ({"reduction": "mean"}, r"^reduction: expected one of 'sum', 'abs_sum', 'square_sum', got 'mean'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scored_mlp_backward(**{**GOOD, **changed})
