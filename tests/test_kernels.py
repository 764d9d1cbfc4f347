"""product_sum against a loop in float64: odd shapes, masks, dtypes, and arguments that don't fit together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur_kernels import product_sum

SHAPES = [(1, 1, 1), (1, 63, 1), (3, 63, 60), (2, 5, 123), (7, 1, 37), (5, 0, 4)]


def loop(x: Tensor, dx: Tensor, mask: Tensor | None) -> Tensor:
    batch, tokens, channels = x.shape
    out = torch.zeros(batch, channels, dtype=torch.float64)
    for b in range(batch):
        for t in range(tokens):
            if mask is None or mask[b, t]:
                out[b] += x[b, t].double() * dx[b, t].double()
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [None, torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_loop(shape: tuple[int, int, int], masked: torch.dtype | None, dtype: torch.dtype) -> None:
    x, dx = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    mask = None if masked is None else (torch.rand(shape[:2]) > 0.3).to(masked)
    out = product_sum(x, dx, mask)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.shape == (shape[0], shape[2])
    # Half precision is widened before the product: only the sum's own rounding is left.
    limit = (1e-14 if dtype == torch.float64 else 3e-6) * max(1.0, shape[1] ** 0.5)
    assert float((out.double() - loop(x, dx, mask)).abs().max()) <= limit * 4


def test_masked_tokens_do_not_count() -> None:
    x, dx, mask = torch.randn(2, 9, 5), torch.randn(2, 9, 5), torch.ones(2, 9)
    mask[1, 4:] = 0
    out = product_sum(x, dx, mask)
    assert torch.equal(out[0], product_sum(x[:1], dx[:1])[0])
    torch.testing.assert_close(out[1], product_sum(x[1:, :4], dx[1:, :4])[0])


def test_strided_inputs() -> None:
    x, dx = torch.randn(11, 3, 7).transpose(0, 1), torch.randn(3, 7, 11).transpose(1, 2)
    torch.testing.assert_close(product_sum(x, dx), loop(x, dx, None).float())


def test_inputs_are_not_written() -> None:
    x, dx, mask = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.ones(2, 3)
    copies = x.clone(), dx.clone(), mask.clone()
    product_sum(x, dx, mask)
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
