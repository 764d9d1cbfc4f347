"""Least squares from sums: the same numbers as from the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.recovery.least_squares import RIDGES, Moments, best_ridge, step


def tokens(seed: int, count: int = 20) -> tuple[Tensor, Tensor]:
    """Inputs [count, 3] and outputs [count, 2] whose means are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64) + 2
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return inputs, inputs @ torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 1.0]], dtype=torch.float64) + noise - 4


def moments(inputs: Tensor, outputs: Tensor) -> Moments:
    """The sums over the tokens, added in two parts of different lengths."""
    first, rest = Moments(), Moments()
    first.add(inputs[:7], outputs[:7])
    rest.add(inputs[7:9], outputs[7:9])
    rest.add(inputs[9:], outputs[9:])
    return first.plus(rest)


def test_sums_means_and_size() -> None:
    inputs, outputs = tokens(0)
    sums = moments(inputs, outputs)
    assert sums.tokens == 20
    assert sums.size == pytest.approx(float(outputs.square().sum()))
    torch.testing.assert_close(sums.means, (inputs.mean(0), outputs.mean(0)))
    torch.testing.assert_close(sums.about(None), (inputs.T @ inputs, outputs.T @ inputs))


@pytest.mark.parametrize("shift", [0.0, 0.7], ids=["own-means", "other-means"])
def test_sums_about_means(shift: float) -> None:
    inputs, outputs = tokens(1)
    of_inputs, of_outputs = inputs.mean(0) + shift, outputs.mean(0) - shift
    h, y = inputs - of_inputs, outputs - of_outputs
    torch.testing.assert_close(moments(inputs, outputs).about((of_inputs, of_outputs)), (h.T @ h, y.T @ h))


@pytest.mark.parametrize("bias", [None, (1.5, -0.5)])
def test_the_error_of_a_weight_and_a_bias(bias: tuple[float, float] | None) -> None:
    inputs, outputs = tokens(2)
    weight = torch.tensor([[1.0, 0.5, 2.0], [-1.0, 2.0, 0.0]], dtype=torch.float64)
    added = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    given = inputs @ weight.T + (0 if added is None else added)
    expected = float((outputs - given).square().sum())
    assert moments(inputs, outputs).error(weight, added) == pytest.approx(expected, rel=1e-12)


def test_no_error_is_negative() -> None:
    inputs, _ = tokens(3)
    sums = moments(inputs, inputs * 1e6)
    assert 0 <= sums.error(torch.eye(3, dtype=torch.float64) * 1e6, None) < 1e-12 * sums.size


def test_a_step_minimises_what_it_is_said_to() -> None:
    matrix, missing = moments(*tokens(4)).about(None)
    taken = step(matrix, missing, 0.1).requires_grad_()
    ridge = 0.1 * matrix.diagonal().mean()
    objective = (taken @ matrix @ taken.T).trace() - 2 * (taken @ missing.T).trace() + ridge * taken.square().sum()
    (gradient,) = torch.autograd.grad(objective, taken)
    assert float(gradient.abs().max()) < 1e-9 * float(missing.abs().max())


@pytest.mark.parametrize("seed", range(6))
def test_the_best_ridge_is_the_one_with_the_least_error_on_other_tokens(seed: int) -> None:
    """Noise in the fitted tokens makes the best ridge neither the lowest nor the highest one."""
    fitted, held_out = (moments(*tokens(10 * seed + k, count)).about(None) for k, count in ((0, 10), (1, 20)))
    fitted = (fitted[0], fitted[1] + 20 * torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)))

    def error(ridge: float) -> float:
        taken = step(*fitted, ridge)
        return float((taken @ held_out[0] @ taken.T).trace() - 2 * (taken @ held_out[1].T).trace())

    errors = {ridge: error(ridge) for ridge in RIDGES}
    best, change = best_ridge([(fitted, held_out)])
    assert best is not None
    assert change == pytest.approx(errors[best])
    assert errors[best] == pytest.approx(min(errors.values()), rel=1e-9)
    assert errors[best] < 0
    assert RIDGES[0] < best < RIDGES[-1]


def test_where_no_step_helps_there_is_no_ridge() -> None:
    matrix, missing = moments(*tokens(5)).about(None)
    assert best_ridge([((matrix, missing), (matrix, -missing))]) == (None, 0.0)


def test_errors_are_summed_over_the_folds() -> None:
    """The first fold alone has another best ridge than both together, and the second one none."""
    fitted, held_out, other = (moments(*tokens(seed)).about(None) for seed in (6, 7, 8))
    small = (held_out[0] / 50, -held_out[1] / 50)
    alone, gain = best_ridge([(fitted, held_out)])
    both, less = best_ridge([(fitted, held_out), (other, small)])
    assert best_ridge([(other, small)]) == (None, 0.0)
    assert both is not None
    assert alone is not None
    assert both >= alone
    assert gain < less < 0
