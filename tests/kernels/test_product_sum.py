"""product_sum compared with a loop in float64: odd shapes, masks, dtypes, strides, and arguments that do not fit together."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, DTYPES, MASKS, TOKENS, assert_exact, device, poisoned, random_mask
from torch import Tensor

from secateur_kernels import product_sum
from secateur_kernels.backend import Backend

CHANNELS = [1, 60, 123]


def loop(x: Tensor, dx: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the formula token by token in float64."""
    x, dx = x.cpu().double(), dx.cpu().double()
    out = torch.zeros(x.shape[0], x.shape[2], dtype=torch.float64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[b] += x[b, t] * dx[b, t] * (1 if mask is None else mask[b, t].cpu())
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", MASKS, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_equals_loop(
    tokens: tuple[int, int], channels: int, masked: torch.dtype | None, dtype: torch.dtype, backend: Backend
) -> None:
    x, dx = (torch.randn(*tokens, channels).to(device(backend), dtype) for _ in range(2))
    mask = random_mask(tokens, masked, device(backend))
    with poisoned():
        out = product_sum(x, dx, mask, backend=backend)
    assert out.dtype == torch.float32
    eager = x.float() * dx.float() * (1 if mask is None else mask.unsqueeze(-1))
    assert_exact(out, loop(x, dx, mask), eager.sum(1), eager.abs().sum(1))


def test_float64() -> None:
    x, dx = torch.randn(2, 3, 63, 60, dtype=torch.float64)
    torch.testing.assert_close(product_sum(x, dx), loop(x, dx, None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_do_not_count(backend: Backend) -> None:
    x, dx = torch.randn(2, 2, 9, 5, device=device(backend))
    mask = torch.ones(2, 9, device=device(backend))
    mask[1, 4:] = 0
    out = product_sum(x, dx, mask, backend=backend)
    assert torch.equal(out[0], product_sum(x[:1], dx[:1], backend=backend)[0])
    torch.testing.assert_close(out[1], product_sum(x[1:, :4], dx[1:, :4], backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: Backend) -> None:
    x = torch.randn(11, 3, 7, device=device(backend)).transpose(0, 1)
    dx = torch.randn(3, 7, 22, device=device(backend))[..., ::2].transpose(1, 2)
    mask = (torch.rand(11, 3, device=device(backend)) > 0.3).T
    torch.testing.assert_close(product_sum(x, dx, mask, backend=backend).cpu(), loop(x, dx, mask).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_written_and_two_runs_are_one(backend: Backend) -> None:
    x, dx = torch.randn(2, 2, 300, 4, device=device(backend))
    mask = torch.ones(2, 300, device=device(backend))
    copies = x.clone(), dx.clone(), mask.clone()
    assert torch.equal(product_sum(x, dx, mask, backend=backend), product_sum(x, dx, mask, backend=backend))
    assert all(torch.equal(now, before) for now, before in zip((x, dx, mask), copies, strict=True))


@pytest.mark.parametrize(
    ("x", "dx", "mask", "message"),
    [
        ((2, 3, 4), (2, 3, 5), None, r"^x, dx: expected .* got \(2, 3, 4\) and \(2, 3, 5\)"),
        ((3, 4), (3, 4), None, r"^x, dx: expected two tensors \[B, T, C\]"),
        ((2, 3, 4), (1, 3, 4), None, r"^x, dx: expected"),
        ((2, 3, 4), (2, 3, 4), (2, 4), r"^mask: expected shape \(2, 3\), got \(2, 4\)"),
        ((2, 3, 4), (2, 3, 4), (2, 3, 1), r"^mask: expected shape"),
    ],
    ids=["channels", "two-dimensional", "batch", "mask-length", "mask-dimensions"],
)
def test_shapes_that_do_not_agree(x: tuple[int, ...], dx: tuple[int, ...], mask: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        product_sum(torch.ones(x), torch.ones(dx), None if mask is None else torch.ones(mask))


@pytest.mark.parametrize(
    ("x", "dx"), [(torch.float32, torch.float64), (torch.int64, torch.int64), (torch.bfloat16, torch.float16)], ids=str
)
def test_dtypes_that_do_not_agree(x: torch.dtype, dx: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"^x, dx: expected one floating dtype, got"):
        product_sum(torch.ones(1, 2, 3, dtype=x), torch.ones(1, 2, 3, dtype=dx))


def test_devices_that_do_not_agree() -> None:
    with pytest.raises(ValueError, match=r"^x, mask: expected one device, got cpu and meta"):
        product_sum(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2, device="meta"))
