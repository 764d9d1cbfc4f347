"""Masks as parametrizations: their outputs and their straight-through gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import METHODS
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.learned.multitask.parametrizations import MASKS, Granularity, Mask, Method

SHAPES = [(5, 7), (7, 5), (6, 6), (1, 4)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def masked(shape: tuple[int, int], granularity: Granularity, method: Method) -> tuple[Any, Mask]:
    """Build a float64 linear layer with a mask on its weight; return both."""
    layer = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    mask = MASKS[granularity](layer.weight, method)
    parametrize.register_parametrization(layer, "weight", mask)
    return layer, mask


def half(mask: Mask) -> Tensor:
    """Set a mask that keeps every other entry, and return it."""
    chosen = torch.arange(mask.entries) % 2 == 0
    mask.keep_(chosen)
    return chosen


def backward(layer: nn.Linear) -> Tensor:
    """Backpropagate a loss of the layer's outputs; return dL/d(the layer's weight)."""
    x = torch.randn(11, layer.in_features, dtype=torch.float64)
    with parametrize.cached():
        layer.weight.retain_grad()
        (layer(x) ** 3).mean().backward()
        gradient = layer.weight.grad
    assert isinstance(gradient, Tensor)
    return gradient


def close(first: Tensor | None, second: Tensor) -> bool:
    return first is not None and torch.allclose(first, second, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("open_", [False, True])
@every_shape
def test_a_score_of_an_element_learns_as_if_it_were_its_mask(shape: tuple[int, int], open_: bool) -> None:
    layer, mask = masked(shape, "element", "movement")
    chosen = torch.ones(mask.entries, dtype=torch.bool) if open_ else half(mask)
    weight, scores = layer.parametrizations.weight.original, mask.scores
    assert torch.equal(layer.weight, weight * chosen.view(shape))
    gradient = backward(layer)
    assert scores is not None
    assert scores.grad is not None
    for row in range(shape[0]):
        for column in range(shape[1]):
            # dL/dS = dL/d(W M) * W, also for a pruned element; dL/dW = dL/d(W M) * M.
            assert scores.grad[row, column] == gradient[row, column] * weight[row, column] != 0
            stays = bool(chosen.view(shape)[row, column])
            assert weight.grad[row, column] == (gradient[row, column] if stays else 0)


@pytest.mark.parametrize("open_", [False, True])
@every_shape
def test_a_score_of_a_rank_learns_as_if_it_were_its_mask(shape: tuple[int, int], open_: bool) -> None:
    layer, mask = masked(shape, "rank", "movement")
    chosen = torch.ones(mask.entries, dtype=torch.bool) if open_ else half(mask)
    held = layer.parametrizations.weight
    left, values, right = held.original0, held.original1, held.original2
    product = sum(left[:, [k]] @ right[[k]] * values[k] for k in range(mask.entries) if chosen[k])
    assert torch.allclose(layer.weight, product, rtol=1e-12, atol=1e-14)
    gradient = backward(layer)
    assert mask.scores is not None
    for k in range(mask.entries):
        by_value = left[:, k] @ gradient @ right[k]
        assert close(mask.scores.grad[k], by_value * values[k])  # type: ignore[index]
        assert close(values.grad[k], by_value * chosen[k])
        assert close(left.grad[:, k], gradient @ right[k] * values[k] * chosen[k])
        assert close(right.grad[k], left[:, k] @ gradient * values[k] * chosen[k])


@pytest.mark.parametrize("granularity", MASKS)
@every_shape
def test_by_magnitude_what_is_pruned_has_no_gradient(shape: tuple[int, int], granularity: Granularity) -> None:
    layer, mask = masked(shape, granularity, "magnitude")
    chosen = half(mask)
    assert mask.scores is None
    gradient = backward(layer)
    held = layer.parametrizations.weight
    if granularity == "element":
        assert close(held.original.grad, gradient * chosen.view(shape))
    else:
        by_value = torch.einsum("mk,mn,kn->k", held.original0, gradient, held.original2)
        assert close(held.original1.grad, by_value * chosen)
        assert not held.original0.grad[:, ~chosen].any()
        assert not held.original2.grad[~chosen].any()


@pytest.mark.parametrize("granularity", MASKS)
@pytest.mark.parametrize("method", METHODS)
def test_the_gradients_are_those_of_autograd_through_a_plain_product(method: Method, granularity: Granularity) -> None:
    """Compute the same loss with M as a tensor with a gradient: the scores get the gradient of M."""
    layer, mask = masked((5, 7), granularity, method)
    chosen = half(mask).double().requires_grad_()
    held = [p.detach().clone().requires_grad_() for p in layer.parametrizations.weight.parameters() if p is not mask.scores]
    weight = held[0] * chosen.view(5, 7) if granularity == "element" else held[0] * (held[1] * chosen) @ held[2]
    x = torch.randn(3, 7, dtype=torch.float64)
    (nn.functional.linear(x, weight, layer.bias) ** 3).sum().backward()  # type: ignore[no-untyped-call]
    layer.zero_grad()
    (layer(x) ** 3).sum().backward()
    ours = [p.grad for p in layer.parametrizations.weight.parameters() if p is not mask.scores]
    assert all(close(mine, naive.grad) for mine, naive in zip(ours, held, strict=True))
    if method == "movement":
        assert close(mask.scores.grad.flatten(), chosen.grad)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("granularity", MASKS)
def test_importance_is_the_value_or_the_score(granularity: Granularity) -> None:
    layer, mask = masked((5, 7), granularity, "magnitude")
    held = list(layer.parametrizations.weight.parameters())
    entries = held[0] if granularity == "element" else held[1]
    with torch.no_grad():
        entries.neg_()  # Training can make singular values negative. Their absolute value counts.
    assert torch.equal(mask.importance(*held), entries.abs().flatten())
    layer, mask = masked((5, 7), granularity, "movement")
    assert mask.scores is not None
    held = [parameter for parameter in layer.parametrizations.weight.parameters() if parameter is not mask.scores]
    assert not mask.importance(*held).any()  # They start from zero.
    with torch.no_grad():
        mask.scores.copy_(torch.randn(mask.scores.shape))
    importance = mask.importance(*held)
    assert torch.equal(importance, mask.scores.flatten())  # A negative score is less important than zero.
    assert not importance.requires_grad


def test_a_mask_with_all_entries_is_none() -> None:
    _, mask = masked((5, 7), "element", "movement")
    assert mask.mask is None
    mask.keep_(torch.ones(35, dtype=torch.bool))
    assert mask.mask is None
    assert mask.kept == 35
    half(mask)
    assert mask.kept == 18
    assert "mask" not in mask.state_dict()  # Importance and step determine the mask.


@pytest.mark.parametrize("shape", [(23, 17), (17, 23), (20, 20), (1, 9)], ids=str)
def test_at_full_rank_the_layer_is_reproduced(shape: tuple[int, int]) -> None:
    """The error stays below that of a float32 decomposition: the machine epsilon times size and norm, computed in float64."""
    weight = torch.randn(shape)
    layer = nn.Linear(shape[1], shape[0])
    layer.weight.data = weight.clone()
    parametrize.register_parametrization(layer, "weight", MASKS["rank"](layer.weight, "magnitude"))
    reproduced = layer.weight.detach()
    assert reproduced.dtype == torch.float32
    bound = torch.finfo(torch.float32).eps * max(shape) * float(torch.linalg.matrix_norm(weight.double(), 2))
    assert float((reproduced.double() - weight.double()).abs().max()) < bound < 3e-5
    x = torch.randn(5, shape[1], dtype=torch.float64)
    exact = nn.functional.linear(x, weight.double(), layer.bias.double())
    assert float((layer(x.float()) - exact).detach().abs().max()) < bound * float(x.norm(dim=1).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_have_the_weights_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 6).to(dtype)
    layer = nn.Linear(6, 9, dtype=dtype)
    layer.weight.data = weight.clone()
    parametrize.register_parametrization(layer, "weight", MASKS["rank"](layer.weight, "movement"))
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    error = float((layer.weight.detach().double() - weight.double()).abs().max())
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("shape", "stored"), [((6, 4), [0, 10, 20, 24, 24]), ((2, 2), [0, 4, 4]), ((1, 5), [0, 5])])
def test_what_a_checkpoint_holds_of_a_matrix(shape: tuple[int, int], stored: list[int]) -> None:
    weight = torch.randn(shape)
    ranks, elements = (MASKS[granularity](weight, "magnitude") for granularity in ("rank", "element"))
    assert [ranks.stored(kept) for kept in range(ranks.entries + 1)] == stored
    assert [elements.stored(kept) for kept in range(3)] == [0, 1, 2]
    assert elements.weights == ranks.weights == shape[0] * shape[1]
