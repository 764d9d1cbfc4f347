"""neuron_attribution compared with a loop in float64: odd shapes, masks, dtypes, reductions, strides, and bad input."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from kernel_cases import BACKENDS, DTYPES, MASKS, TOKENS, assert_exact, device, poisoned, random_mask
from torch import Tensor

from secateur_kernels import neuron_attribution
from secateur_kernels.backend import Backend, Reduction

# D and F: one, odd numbers, more than the kernel's tiles hold, and zero.
WIDTHS = [(1, 1), (60, 123), (130, 131), (0, 3), (4, 0)]


def loop(h: Tensor, g: Tensor, weight: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Compute the formula token by token in float64."""
    h, g, weight = (tensor.cpu().double() for tensor in (h, g, weight))
    out = torch.zeros(h.shape[0], h.shape[2], dtype=torch.float64)
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            score = h[b, t] * sum((g[b, t, d] * weight[d] for d in range(g.shape[2])), torch.zeros(h.shape[2]).double())
            score = {"sum": score, "abs_sum": score.abs(), "square_sum": score**2}[reduction]
            out[b] += score * (1 if mask is None else mask[b, t].cpu())
    return out


def size(h: Tensor, g: Tensor, weight: Tensor, reduction: Reduction) -> Tensor:
    """Return the sum of the absolute values of all terms. For a square, both factors count."""
    terms = h.double().abs() * (g.double().abs() @ weight.double().abs())
    return (2 * terms.square() if reduction == "square_sum" else terms).sum(1)


def check(
    tokens: tuple[int, int],
    widths: tuple[int, int],
    masked: torch.dtype | None,
    dtype: torch.dtype,
    reduction: Reduction,
    backend: Backend,
) -> None:
    """Compare one case with the loop."""
    where, (width, neurons) = device(backend), widths
    h, g = torch.randn(*tokens, neurons).to(where, dtype), torch.randn(*tokens, width).to(where, dtype)
    weight = torch.randn(width, neurons).to(where, dtype)
    mask = random_mask(tokens, masked, where)
    with poisoned():
        out = neuron_attribution(h, g, weight, mask, reduction, backend=backend)
    assert out.dtype == torch.float32
    on_cpu = None if mask is None else mask.cpu()
    eager = neuron_attribution(h.cpu().float(), g.cpu().float(), weight.cpu().float(), on_cpu, reduction)
    assert_exact(out, loop(h, g, weight, mask, reduction), eager, size(h, g, weight, reduction))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_equals_loop(tokens: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, backend: Backend) -> None:
    check(tokens, widths, torch.bool, dtype, "sum", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", MASKS, ids=str)
@pytest.mark.parametrize("reduction", get_args(Reduction))
@pytest.mark.parametrize("tokens", [(3, 63), (7, 1), (40, 5)], ids=str)
def test_reductions_and_masks(
    tokens: tuple[int, int], reduction: Reduction, masked: torch.dtype | None, backend: Backend
) -> None:
    check(tokens, (60, 33), masked, torch.float32, reduction, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_tiles_of_half_precision(backend: Backend) -> None:
    check((2, 70), (1024, 272), torch.float32, torch.bfloat16, "sum", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_other_examples_do_not_count(backend: Backend) -> None:
    h, g = torch.randn(5, 40, 7, device=device(backend)), torch.randn(5, 40, 6, device=device(backend))
    weight = torch.randn(6, 7, device=device(backend))
    h[2] = torch.nan
    scores = neuron_attribution(h, g, weight, backend=backend)
    assert scores.isnan().all(1).tolist() == [False, False, True, False, False]
    for b in (0, 1, 3, 4):
        torch.testing.assert_close(scores[b : b + 1], neuron_attribution(h[b : b + 1], g[b : b + 1], weight, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_two_runs_and_inputs_unwritten(backend: Backend) -> None:
    where = device(backend)
    h = torch.randn(9, 3, 10, device=where).transpose(0, 1)
    g = torch.randn(3, 9, 24, device=where)[..., ::2]
    weight = torch.randn(10, 12, device=where).T
    mask = (torch.rand(9, 3, device=where) > 0.3).T
    copies = [tensor.clone() for tensor in (h, g, weight, mask)]
    out = neuron_attribution(h, g, weight, mask, backend=backend)
    torch.testing.assert_close(out.cpu().double(), loop(h, g, weight, mask, "sum"), rtol=1e-4, atol=1e-5)
    assert torch.equal(out, neuron_attribution(h, g, weight, mask, backend=backend))
    assert all(torch.equal(now, before) for now, before in zip((h, g, weight, mask), copies, strict=True))


def test_float64() -> None:
    h, g, weight = torch.randn(2, 9, 7).double(), torch.randn(2, 9, 6).double(), torch.randn(6, 7).double()
    torch.testing.assert_close(neuron_attribution(h, g, weight), loop(h, g, weight, None, "sum"))


GOOD: dict[str, Any] = {"h": torch.ones(2, 3, 4), "g": torch.ones(2, 3, 5), "weight": torch.ones(5, 4)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"h": torch.ones(3, 4)}, r"^h: expected \[B, T, F\], got shape \(3, 4\)"),
        ({"g": torch.ones(2, 5)}, r"^g: expected \[B, T, D\], got shape \(2, 5\)"),
        ({"g": torch.ones(2, 4, 5)}, r"^g: expected shape \(2, 3, 5\), got \(2, 4, 5\)"),
        ({"weight": torch.ones(4, 5)}, r"^weight: expected shape \(5, 4\), got \(4, 5\)"),
        ({"mask": torch.ones(2, 4)}, r"^mask: expected shape \(2, 3\), got \(2, 4\)"),
        ({"weight": torch.ones(5, 4).half()}, r"^h, g, weight: expected one floating dtype, got .*float32 and .*float16"),
        ({"g": torch.ones(2, 3, 5, device="meta")}, r"^h, g, weight: expected one device, got cpu and meta"),
        ({"reduction": "mean"}, r"^reduction: expected one of 'sum', 'abs_sum', 'square_sum', got 'mean'"),
        ({"backend": "cuda"}, r"^backend: expected one of 'auto', 'reference', 'triton', got 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neuron_attribution(**{**GOOD, **changed})
